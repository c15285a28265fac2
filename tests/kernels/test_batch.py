"""Planning of batches, and cutting them into tiles."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ranklet.kernels.batch import LoraBatch, cut, plan, plan_evenly
from ranklet.kernels.powers import power_of_four
from ranklet.kernels.row_tiles import BLOCK_ROWS, padded_runs
from ranklet.kernels.segments import Segment, Segments

requests = st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 5)), max_size=40)


def rows_in_order(lengths: list[int], slots: list[int | None], order: list[int]) -> list[int | None]:
    """Return the slot of every row of the batch."""
    return [slots[i] for i in order for _ in range(lengths[i])]


@given(requests)
def test_a_plan_covers_each_adapters_rows_and_nothing_else(made: list[tuple[int, int | None]]) -> None:
    lengths, slots = [length for length, _ in made], [slot for _, slot in made]
    order, batch = plan(lengths, slots)
    assert sorted(order) == list(range(len(made)))
    rows = rows_in_order(lengths, slots, order)
    assert batch.rows == len(rows)
    covered: list[int | None] = [None] * batch.rows
    for segment in batch.segments:
        assert 0 <= segment.start < segment.stop <= batch.rows
        for row in range(segment.start, segment.stop):
            assert covered[row] is None, "segments overlap"
            covered[row] = segment.slot
    assert covered == rows


@given(requests)
def test_each_adapter_has_one_segment_in_row_order(made: list[tuple[int, int | None]]) -> None:
    _, batch = plan([length for length, _ in made], [slot for _, slot in made])
    assert len({segment.slot for segment in batch.segments}) == batch.adapters == len(batch.segments)
    starts = [segment.start for segment in batch.segments]
    assert starts == sorted(starts)
    assert sum(segment.rows for segment in batch.segments) == sum(length for length, slot in made if slot is not None)


@given(requests)
def test_arrival_order_is_kept_inside_an_adapter(made: list[tuple[int, int | None]]) -> None:
    order, _ = plan([length for length, _ in made], [slot for _, slot in made])
    for slot in {slot for _, slot in made}:
        inside = [i for i in order if made[i][1] == slot]
        assert inside == sorted(inside)


@given(requests, st.integers(1, 90))
def test_tiles_and_blocks_cover_each_segment(made: list[tuple[int, int | None]], times: int) -> None:
    _, batch = plan([length * times for length, _ in made], [slot for _, slot in made])
    kinds = cut(batch)
    assert [tuple(segment) for tiles in kinds for segment in Segments(tiles.runs)] == [*map(tuple, batch.segments)]
    for tiles in kinds:
        slots = {row: slot for start, stop, slot in tiles.table.tolist() for row in range(start, stop)}
        begin, end = tiles.rows
        assert slots == {
            row: segment.slot for segment in Segments(tiles.runs) for row in range(segment.start, segment.stop)
        }
        assert all(stop - start <= tiles.height for start, stop, _ in tiles.table.tolist())
        assert len(tiles.blocks) == -(-(end - begin) // BLOCK_ROWS)
        for block, (first, last) in enumerate(tiles.blocks.tolist()):
            rows = range(begin + block * BLOCK_ROWS, min(begin + (block + 1) * BLOCK_ROWS, end))
            assert {slots[row] for row in rows} == {segment.slot for segment in Segments(tiles.runs[first:last])}


@given(requests, st.integers(1, 90), st.integers(0, 500))
def test_the_layout_of_padded_tiles_depends_only_on_rows_and_adapters(
    made: list[tuple[int, int | None]], times: int, more: int
) -> None:
    _, batch = plan([length * times for length, _ in made], [slot for _, slot in made])
    batch = replace(batch, rows=batch.rows + more)
    if not batch.segments:
        assert cut(batch, padded=True) == ()
        return
    (tiles,) = cut(batch, padded=True)
    adapters = padded_runs(batch.adapters, batch.rows)
    assert (len(tiles.table), len(tiles.runs)) == (batch.rows // tiles.height + adapters, adapters)
    assert (tiles.rows, len(tiles.blocks)) == ((0, batch.rows), -(-batch.rows // BLOCK_ROWS))
    (one,) = cut(LoraBatch((Segment(0, 0, batch.rows),), batch.rows), padded=True)
    assert adapters > 1 or one.height == tiles.height
    covered = [(row, slot) for start, stop, slot in tiles.table.tolist() for row in range(start, stop)]
    assert covered == [(row, segment.slot) for segment in batch.segments for row in range(segment.start, segment.stop)]
    assert all(stop - start <= tiles.height for start, stop, _ in tiles.table.tolist())
    for block, (first, last) in enumerate(tiles.blocks.tolist()):
        rows = range(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        assert {slot for row, slot in covered if row in rows} == {s.slot for s in Segments(tiles.runs[first:last])}


def test_padded_runs_are_few() -> None:
    assert [padded_runs(count, 16) for count in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]
    assert [padded_runs(count, 256) for count in (1, 2, 4, 5, 64, 65)] == [1, 4, 4, 64, 64, 256]
    assert [padded_runs(count, 257) for count in (1, 4, 5, 17)] == [4, 4, 16, 64]


def test_powers_of_four() -> None:
    assert [power_of_four(count) for count in (0, 1, 2, 4, 5, 16, 17)] == [1, 1, 4, 4, 16, 16, 64]


def test_slot_zero_is_not_the_base_model() -> None:
    order, batch = plan([2, 3, 1], [None, 0, None])
    assert order == [1, 0, 2]
    assert batch == LoraBatch((Segment(0, 0, 3),), rows=6)


def test_an_adapter_whose_requests_are_all_empty_has_no_segment() -> None:
    assert plan([0, 4], [1, 2])[1].segments == (Segment(2, 0, 4),)


def test_no_requests() -> None:
    assert plan([], []) == ([], LoraBatch((), rows=0))


def test_rows_are_shared_evenly() -> None:
    batch = plan_evenly(11, 4)
    assert [(segment.slot, segment.rows) for segment in batch.segments] == [(0, 3), (1, 3), (2, 3), (3, 2)]
