"""Batches of some rows of a batch: outputs are rows of the full batch's output."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels import native
from ranklet.kernels.batch import LoraBatch, plan
from ranklet.kernels.row_subset import check_rows, row_range, subset, subset_by_counts
from ranklet.kernels.segments import Segment
from tests.kernels import oracle

WIDE, WIDTHS, SLOTS, RANK = 12, (20,), 4, 16
ADAPTERS = oracle.random_adapters({0: (1,), 1: (3,), 2: (16,), 3: (8,)}, WIDE, WIDTHS)
STACK = oracle.linear_stack(ADAPTERS, SLOTS, RANK, WIDE, WIDTHS, stale=float("nan"))
WEIGHT = torch.randn(sum(WIDTHS), WIDE, generator=torch.Generator().manual_seed(1))
BATCH = LoraBatch((Segment(2, 0, 3), Segment(0, 3, 4), Segment(1, 4, 9)), rows=12, implementation=native)

requests = st.lists(st.tuples(st.integers(0, 6), st.none() | st.integers(0, SLOTS - 1)), max_size=12)


def by_row(batch: LoraBatch) -> list[int | None]:
    """Return the slot of each row. Asserts that segments are joined, not empty, and of different slots."""
    rows: list[int | None] = []
    for segment in batch.segments:
        assert segment.start == len(rows)
        assert segment.rows > 0
        rows += [segment.slot] * segment.rows
    assert len({segment.slot for segment in batch.segments}) == batch.adapters
    return rows + [None] * (batch.rows - len(rows))


def head(x: Tensor, batch: LoraBatch) -> Tensor:
    check_rows(x, batch)
    return native.linear(x, WEIGHT, None, STACK, batch)


def planned(made: Sequence[tuple[int, int | None]]) -> tuple[LoraBatch, list[int]]:
    """Return a batch, and the lengths of its requests in the order of their rows."""
    lengths = [length for length, _ in made]
    order, batch = plan(lengths, [slot for _, slot in made])
    return batch, [lengths[i] for i in order]


@settings(max_examples=60)
@given(requests, st.data())
def test_the_output_of_a_subset_is_rows_of_the_full_output(
    made: list[tuple[int, int | None]], data: st.DataObject
) -> None:
    batch, _ = planned(made)
    kept = data.draw(st.lists(st.booleans(), min_size=batch.rows, max_size=batch.rows))
    rows = np.flatnonzero(kept)
    pruned = subset(batch, rows)
    full = by_row(batch)
    assert by_row(pruned) == [full[row] for row in rows]
    x = torch.randn(batch.rows, WIDE)
    assert_close(head(x[rows], pruned), head(x, batch)[rows])


@settings(max_examples=60)
@given(requests, st.data())
def test_counts_per_request_select_the_same_rows(made: list[tuple[int, int | None]], data: st.DataObject) -> None:
    batch, lengths = planned(made)
    kept = [data.draw(st.integers(0, length)) for length in lengths]
    ends = np.cumsum([0, *lengths])
    last = [row for end, count in zip(ends[1:], kept, strict=True) for row in range(end - count, end)]
    assert subset_by_counts(batch, kept, lengths) == subset(batch, np.array(last, dtype=np.int64))


@settings(max_examples=60)
@given(requests, st.integers(1, 9))
def test_the_outputs_of_all_chunks_are_the_full_output(made: list[tuple[int, int | None]], size: int) -> None:
    batch, _ = planned(made)
    x = torch.randn(batch.rows, WIDE)
    ranges = [(start, min(start + size, batch.rows)) for start in range(0, batch.rows, size)]
    chunks = [row_range(batch, start, stop) for start, stop in ranges]
    assert [slot for part in chunks for slot in by_row(part)] == by_row(batch)
    outputs = [head(x[start:stop], part) for (start, stop), part in zip(ranges, chunks, strict=True)]
    assert_close(torch.cat([torch.empty(0, sum(WIDTHS)), *outputs]), head(x, batch))


def test_chunks_of_pruned_rows() -> None:
    x = torch.randn(12, WIDE)
    rows = np.array([1, 2, 3, 5, 8, 9, 11])
    pruned = subset(BATCH, rows)
    assert pruned.segments == (Segment(2, 0, 2), Segment(0, 2, 3), Segment(1, 3, 5))
    parts = [head(x[rows[i : i + 2]], row_range(pruned, i, min(i + 2, 7))) for i in range(0, 7, 2)]
    assert_close(torch.cat(parts), head(x, BATCH)[rows])


def test_the_backend_is_kept_unless_no_row_has_an_adapter() -> None:
    assert row_range(BATCH, 2, 5) == LoraBatch((Segment(2, 0, 1), Segment(0, 1, 2), Segment(1, 2, 3)), 3, native)
    assert row_range(BATCH, 9, 12) == subset(BATCH, np.array([9, 10, 11])) == LoraBatch((), 3)
    assert subset_by_counts(BATCH, [0, 0, 0, 2], [3, 1, 5, 3]) == LoraBatch((), 2)
    assert row_range(BATCH, 4, 4) == subset(BATCH, np.array([], dtype=np.int64)) == LoraBatch((), 0)


def test_tiles_are_not_kept() -> None:
    placed = BATCH.with_tiles(torch.device("cpu"))
    assert placed.tiles
    for part in (
        row_range(placed, 2, 7),
        subset(placed, np.arange(1, 8)),
        subset_by_counts(placed, [1, 1, 2, 0], [3, 1, 5, 3]),
    ):
        assert part.segments
        assert part.tiles == ()


def test_requests_without_rows_and_adapters_of_several_requests() -> None:
    lengths = [0, 2, 1, 0, 1, 5, 0, 3]
    pruned = subset_by_counts(BATCH, [0, 1, 0, 0, 1, 2, 0, 1], lengths)
    assert pruned == LoraBatch((Segment(2, 0, 1), Segment(0, 1, 2), Segment(1, 2, 4)), rows=5, implementation=native)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([-1, 2], "-1"), ([3, 12], "12"), ([4, 3], r"\[4 3\]"), ([3, 3], r"\[3 3\]")],
    ids=["negative", "beyond", "decreasing", "twice"],
)
def test_rows_out_of_order_or_range_are_refused(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"increasing indices in \\[0, 12\\), got .*{message}"):
        subset(BATCH, np.array(rows))


@pytest.mark.parametrize(
    ("kept", "lengths"),
    [
        ([1, 1, 1], [3, 1, 5, 3]),
        ([4, 1, 5, 3], [3, 1, 5, 3]),
        ([-1, 1, 5, 3], [3, 1, 5, 3]),
        ([1, 1, 1, 1], [3, 1, 5, 2]),
        ([1, 1, 1, 1], [1, 3, 5, 3]),
        ([1, 1, 1, 1], [3, 1, 5, 99]),
        ([], []),
    ],
    ids=["count", "more than there are", "negative", "too few rows", "other order", "too many rows", "none"],
)
def test_counts_that_contradict_the_batch_are_refused(kept: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        subset_by_counts(BATCH, kept, lengths)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_ranges_outside_the_batch_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"expected a range in \\[0, 12\\], got \\[{start}, {stop}\\)"):
        row_range(BATCH, start, stop)


def test_an_input_with_other_rows_than_the_batch_is_refused() -> None:
    check_rows(torch.empty(12, WIDE), BATCH)
    for rows in (0, 11, 13):
        with pytest.raises(ValueError, match=f"expected 12, the rows of the batch, got {rows}; make"):
            check_rows(torch.empty(rows, WIDE), BATCH)
