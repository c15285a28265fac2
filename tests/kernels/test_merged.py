"""The merging backend against LoRA written out in float64, and which merged weights it keeps, for whom and how many."""

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ranklet.kernels import kept_merges, merge, native
from ranklet.kernels.batch import LoraBatch, Segment, plan
from ranklet.kernels.kept_merges import KeptMerges
from ranklet.kernels.merged import Merged
from ranklet.kernels.mixes import MIXES, Mix, assign
from ranklet.kernels.stack import LinearStack, SlotMeta
from tests.kernels import oracle

NAN = float("nan")
WIDE, SLOTS, RANK = 40, 6, 64
QKV = (24, 8, 8)
RANKS = {0: (1, 1, 1), 1: (3, 0, 8), 2: (8, 8, 8), 3: (40, 64, 40), 4: (64, 64, 64), 5: (0, 0, 0)}
LINEAR = oracle.random_adapters(RANKS, WIDE, QKV)
BYTES = sum(QKV) * WIDE * 4  # of one merged weight
DTYPES = [(torch.float32, 2e-5), (torch.float16, 5e-4), (torch.bfloat16, 3e-3)]

requests = st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, SLOTS - 1)), max_size=12)


def by_row(batch: LoraBatch) -> list[int | None]:
    rows = [segment.slot for segment in batch.segments for _ in range(segment.rows)]
    return [*rows, *[None] * (batch.rows - len(rows))]


def stack_of(
    adapters: oracle.Adapters, wide: int = WIDE, widths: Sequence[int] = QKV, device: str = "cpu"
) -> LinearStack:
    return oracle.linear_stack(adapters, SLOTS, RANK, wide, widths, stale=NAN, device=device)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


def one(slot: int, rows: int = 4) -> LoraBatch:
    return LoraBatch((Segment(slot, 0, rows),), rows=rows)


def check_linear(batch: LoraBatch, *, bias: bool = False) -> None:
    x, weight = torch.randn(batch.rows, WIDE), torch.randn(sum(QKV), WIDE) * WIDE**-0.5
    offset = torch.randn(sum(QKV)) if bias else None
    before = weight.clone()
    y = Merged().linear(x, weight, offset, stack_of(LINEAR), batch)
    assert_close(y.double(), oracle.linear(x, weight, offset, by_row(batch), LINEAR), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight, before)
    base = [t for t, slot in enumerate(by_row(batch)) if slot is None or not any(RANKS[slot])]
    assert_close(y[base], functional.linear(x, weight, offset)[base], rtol=1e-6, atol=1e-6)


# The backend


@settings(max_examples=60)
@given(requests, st.booleans())
def test_linear_on_any_batch(made: list[tuple[int, int | None]], bias: bool) -> None:
    check_linear(plan([length for length, _ in made], [slot for _, slot in made])[1], bias=bias)


@pytest.mark.parametrize(
    "batch",
    [
        LoraBatch((), rows=0),
        LoraBatch((), rows=3),
        one(3, rows=1),
        plan([1] * 5, [4, 3, 2, 1, 0])[1],
        one(5, rows=7),
        LoraBatch((Segment(5, 0, 2), Segment(2, 2, 4), Segment(1, 4, 4), Segment(5, 4, 6)), rows=8),
    ],
    ids=["no rows", "base only", "one row", "a row each", "not targeted", "runs of base rows and an empty one"],
)
def test_ugly_shapes(batch: LoraBatch) -> None:
    check_linear(batch)
    check_linear(batch, bias=True)


@pytest.mark.parametrize("mix", MIXES)
def test_the_four_mixes(mix: Mix) -> None:
    check_linear(plan([1 + i % 5 for i in range(24)], assign(mix, 24, 5))[1], bias=True)


def wide_case(dtype: torch.dtype, mix: Mix, device: str) -> tuple[Tensor, Tensor, LinearStack, LoraBatch, Tensor]:
    """Input, weight, stack and batch of a realistic width, and what float64 makes of them."""
    wide, widths = 1024, (256, 128, 128)
    adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
    slots: list[int | None] = [*assign(mix, 28, 6), None, None]
    _, batch = plan([1 + 5 * (i % 7) for i in range(30)], slots)
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    expected = oracle.linear(x, weight, None, by_row(batch), adapters)
    return x.to(device), weight.to(device), stack_of(adapters, wide, widths, device), batch, expected


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_error_relative_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, stack, batch, expected = wide_case(dtype, "uniform", "cpu")
    assert relative_error(Merged().linear(x, weight, None, stack, batch), expected) <= tolerance


def test_dtypes_and_shapes_in_turn_do_not_share_scratch() -> None:
    backend = Merged()
    for dtype, tolerance in (*DTYPES, *DTYPES):
        for widths, wide in ((QKV, WIDE), ((20, 10, 10), WIDE), ((24, 8, 8), 56), ((16, 16, 24), WIDE)):
            adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
            _, batch = plan([3, 2, 4, 1], [1, 4, 3, None])
            x, weight = torch.randn(10, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
            y = backend.linear(x, weight, None, stack_of(adapters, wide, widths), batch)
            assert y.dtype == dtype
            assert relative_error(y, oracle.linear(x, weight, None, by_row(batch), adapters)) <= tolerance


def test_scratch_made_in_inference_mode_serves_outside_of_it() -> None:
    backend, x, weight, stack = Merged(), torch.randn(4, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    with torch.inference_mode():
        inside = backend.linear(x, weight, None, stack, one(2))
    assert torch.equal(backend.linear(x, weight, None, stack, one(2)), inside)


def test_scratch_holds_as_many_as_a_launch_merges_and_no_more() -> None:
    backend, x, weight, stack = Merged(), torch.randn(5, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    for slots, held in (([0, 1], 2), ([3], 2), ([4, 3, 2, 1, 0], merge.AT_ONCE)):
        _, batch = plan([1] * len(slots), slots)
        backend.linear(x[: batch.rows], weight, None, stack, batch)
        assert [len(scratch) for scratch in backend._scratch.values()] == [held]


def test_scalings_multiply_once_a_slice() -> None:
    """Twice the scaling is twice the change, on each slice by itself."""
    x, weight, stack = torch.randn(4, WIDE), torch.zeros(sum(QKV), WIDE), stack_of(LINEAR)
    stack.describe(2, SlotMeta((8, 8, 8), (1.0, 1.0, 1.0)))
    once = Merged().linear(x, weight, None, stack, one(2))
    stack.describe(2, SlotMeta((8, 8, 8), (1.0, 2.0, -0.3)))
    factors = torch.tensor([1.0] * 24 + [2.0] * 8 + [-0.3] * 8)
    assert_close(Merged().linear(x, weight, None, stack, one(2)), once * factors)


def test_an_adapter_changes_only_its_own_rows() -> None:
    _, batch = plan([3, 4, 2], [2, 4, None])
    x, weight, stack = torch.randn(9, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    before = Merged().linear(x, weight, None, stack, batch)
    stack.a[2].fill_(NAN)
    after = Merged().linear(x, weight, None, stack, batch)
    assert after[:3].isnan().all()
    assert torch.equal(after[3:], before[3:])


def test_other_rows_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4, as the batch is planned, got 5"):
        Merged().linear(torch.randn(5, WIDE), torch.randn(sum(QKV), WIDE), None, stack_of(LINEAR), one(2))


def test_the_embedding_is_natives() -> None:
    adapters = oracle.random_adapters({2: (8,)}, 50, (24,))
    stack = oracle.embedding_stack(adapters, SLOTS, RANK, 50, 24, stale=NAN)
    ids, table = torch.randint(50, (4,)), torch.randn(50, 24)
    expected = native.embedding(ids, table, stack, one(2))
    assert torch.equal(Merged().embedding(ids, table, stack, one(2)), expected)


# What is kept


def kept_backend(budget: int = 100 * BYTES) -> Merged:
    """A backend that takes a slot for dominating after one batch of it alone."""
    backend = Merged(budget)
    backend.kept.half_life_batches = 1.0
    return backend


def run(backend: Merged, weight: Tensor, stack: LinearStack, adapters: oracle.Adapters, batch: LoraBatch) -> None:
    """A batch through one projection, held against float64."""
    backend.observe(batch)
    x = torch.randn(batch.rows, WIDE)
    y = backend.linear(x, weight, None, stack, batch)
    assert_close(y.double(), oracle.linear(x, weight, None, by_row(batch), adapters), rtol=1e-5, atol=1e-5)


def load(stack: LinearStack, adapters: oracle.Adapters, slot: int, seed: int) -> None:
    """Another adapter of the same ranks in a slot, as the pool loads it: new weights, new metadata."""
    adapters |= oracle.random_adapters({slot: RANKS[slot]}, WIDE, QKV, seed=seed)
    fresh = stack_of({slot: adapters[slot]})
    stack.a[slot], stack.b[slot] = fresh.a[slot], fresh.b[slot]
    stack.describe(slot, fresh.meta[slot])


def test_a_kept_copy_is_served_without_merging_again() -> None:
    backend, weight, stack = kept_backend(), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    run(backend, weight, stack, LINEAR, one(2))
    assert backend.kept.held_bytes == BYTES
    copy = backend.kept.find(2, weight, stack.meta[2])
    stack.a[2].fill_(NAN)  # it would show if A were read
    run(backend, weight, stack, LINEAR, one(2))
    assert backend.kept.find(2, weight, stack.meta[2]) is copy


def test_each_projection_has_its_own_copy() -> None:
    backend, stack = kept_backend(), stack_of(LINEAR)
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(3)]
    for weight in (*weights, *weights):
        run(backend, weight, stack, LINEAR, one(2))
    assert backend.kept.held_bytes == 3 * BYTES


def test_another_tenant_of_the_slot_gets_its_own_weights_and_a_share_of_its_own() -> None:
    backend, weight, adapters = kept_backend(), torch.randn(sum(QKV), WIDE), dict(LINEAR)
    stack = stack_of(adapters)
    run(backend, weight, stack, adapters, one(2))
    load(stack, adapters, 2, seed=7)
    run(backend, weight, stack, adapters, one(2))
    assert (backend.kept.held_bytes, backend.kept.share(2), backend.kept.dominates(2)) == (0, 0.0, False)
    run(backend, weight, stack, adapters, one(2))
    assert backend.kept.held_bytes == BYTES


def test_without_a_budget_nothing_is_kept() -> None:
    backend = Merged()
    for _ in range(9):
        run(backend, torch.randn(sum(QKV), WIDE), stack_of(LINEAR), LINEAR, one(2))
    assert (backend.kept.held_bytes, backend.kept.dominates(2)) == (0, False)


def test_the_share_moves_by_batches_and_enters_and_leaves_with_hysteresis() -> None:
    kept = KeptMerges(BYTES, half_life_batches=2.0, enter=0.3, leave=0.1)
    kept.observe(one(1))
    assert kept.share(1) == pytest.approx(1 - 0.5**0.5)
    assert not kept.dominates(1)
    kept.observe(LoraBatch((), rows=9))  # no LoRA rows: says nothing of their shares
    kept.observe(one(1, rows=1000))
    assert kept.share(1) == pytest.approx(0.5)
    assert kept.dominates(1)
    others = LoraBatch((Segment(2, 0, 1), Segment(3, 1, 4)), rows=9)
    for share in (0.25, 0.125):
        kept.observe(others)
        kept.observe(others)
        assert kept.share(1) == pytest.approx(share)
        assert kept.dominates(1)
    assert kept.share(3) == pytest.approx(3 * kept.share(2))
    kept.observe(others)
    assert (kept.share(1) < 0.1, kept.dominates(1), kept.dominates(3)) == (True, False, True)
    kept.observe(LoraBatch((Segment(1, 0, 1), Segment(3, 1, 4)), rows=4))
    assert (0.1 < kept.share(1) < 0.3, kept.dominates(1)) == (True, False)


def test_a_slot_that_stops_dominating_gives_its_copies_back() -> None:
    backend, stack, weight = kept_backend(), stack_of(LINEAR), torch.randn(sum(QKV), WIDE)
    run(backend, weight, stack, LINEAR, one(2))
    for _ in range(3):
        assert backend.kept.find(2, weight, stack.meta[2]) is not None
        backend.observe(one(5))
    backend.observe(one(5))
    assert backend.kept.find(2, weight, stack.meta[2]) is None
    assert backend.kept.held_bytes == 0


def shared(**rows: int) -> LoraBatch:
    segments, start = [], 0
    for slot, count in rows.items():
        segments.append(Segment(int(slot[1:]), start, start + count))
        start += count
    return LoraBatch(tuple(segments), rows=start)


def fill(out: Tensor) -> None:
    out.zero_()


def test_room_is_taken_from_the_least_dominating_and_no_more_than_needed() -> None:
    kept = KeptMerges(4 * BYTES, half_life_batches=1e-3, enter=0.1, leave=0.05)
    metas = {slot: SlotMeta((1,), (1.0,)) for slot in range(4)}
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(5)]

    def holders() -> dict[int, int]:
        return {slot: sum(kept.find(slot, weight, metas[slot]) is not None for weight in weights) for slot in metas}

    kept.observe(shared(s1=19, s2=30, s3=51))
    for weight in weights[:2]:
        assert kept.add(1, weight, metas[1], fill) is not None
        assert kept.add(2, weight, metas[2], fill) is not None
    assert kept.add(2, weights[2], metas[2], fill) is not None  # 30 displaces 19
    assert holders() == {0: 0, 1: 1, 2: 3, 3: 0}
    assert kept.add(1, weights[2], metas[1], fill) is None
    assert kept.add(0, weights[0], metas[0], fill) is None  # not seen at all
    assert kept.add(3, weights[0], metas[3], fill) is not None
    assert kept.add(3, weights[1], metas[3], fill) is not None
    assert holders() == {0: 0, 1: 0, 2: 2, 3: 2}
    assert kept.held_bytes == 4 * BYTES
    kept.observe(shared(s2=49, s3=51))  # hardly more: not worth changing places
    assert kept.add(3, weights[2], metas[3], fill) is None
    big = torch.randn(5 * sum(QKV), WIDE)
    kept.observe(shared(s2=20, s3=80))
    assert kept.add(3, big, metas[3], fill) is None  # nothing is evicted in vain
    assert holders() == {0: 0, 1: 0, 2: 2, 3: 2}


def test_a_slot_never_displaces_itself() -> None:
    kept = KeptMerges(BYTES, displace=1.0, half_life_batches=1.0)
    meta, first, second = SlotMeta((1,), (1.0,)), torch.randn(sum(QKV), WIDE), torch.randn(sum(QKV), WIDE)
    kept.observe(one(0))
    assert kept.add(0, first, meta, fill) is not None
    assert kept.add(0, second, meta, fill) is None
    assert kept.find(0, first, meta) is not None


def test_a_handful_of_rows_among_many_is_not_counted() -> None:
    kept = KeptMerges(BYTES)
    kept.observe(shared(s0=991, s1=9))
    kept.observe(shared(s0=990, s2=10))
    assert kept.share(1) == 0.0
    assert kept.share(2) == pytest.approx(0.01 * (1 - 0.5 ** (1 / 32)))


def test_drop_frees_everything_and_halves_the_budget() -> None:
    backend, stack = kept_backend(5 * BYTES), stack_of(LINEAR)
    weights = [torch.randn(sum(QKV), WIDE) for _ in range(3)]
    for weight in weights:
        run(backend, weight, stack, LINEAR, one(2))
    assert backend.drop() == 3 * BYTES
    assert (backend.kept.held_bytes, backend.kept.max_bytes, backend.kept.dominates(2)) == (0, 5 * BYTES // 2, False)
    for weight in weights:
        run(backend, weight, stack, LINEAR, one(2))
    assert backend.kept.held_bytes == 2 * BYTES
    assert backend.drop() == 2 * BYTES
    assert backend.drop() == 0


def test_a_copy_that_finds_no_memory_drops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, stack = kept_backend(), stack_of(LINEAR)
    first, second = torch.randn(sum(QKV), WIDE), torch.randn(sum(QKV), WIDE)
    run(backend, first, stack, LINEAR, one(2))
    refused, make = [], kept_merges.empty

    def full_device(weight: Tensor, count: int = 1) -> Tensor:
        if backend.kept.held_bytes:
            refused.append(weight)
            raise torch.OutOfMemoryError("the device is full")
        return make(weight, count)

    monkeypatch.setattr(kept_merges, "empty", full_device)
    run(backend, second, stack, LINEAR, one(2))
    assert [weight is second for weight in refused] == [True]
    assert (backend.kept.held_bytes, backend.kept.max_bytes) == (0, 50 * BYTES)


@pytest.mark.parametrize(
    "wrong",
    [{"max_bytes": -1}, {"half_life_batches": 0.0}, {"enter": 0.1, "leave": 0.1}, {"enter": 1.1}, {"displace": 0.9}],
    ids=lambda wrong: "-".join(wrong),
)
def test_numbers_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="kept merges: expected"):
        KeptMerges(**{"max_bytes": 1, **wrong})  # type: ignore[arg-type]


Act = tuple[Literal["run", "load", "drop"], list[int], int]
acts = st.tuples(st.sampled_from(["run"] * 8 + ["load", "load", "drop"]), st.permutations(range(5)), st.integers(0, 99))


@settings(max_examples=40)
@given(st.integers(0, 6), st.lists(acts, max_size=25))
def test_any_history_keeps_to_the_budget_and_serves_the_present_tenants(budget: int, history: list[Act]) -> None:
    backend, adapters = kept_backend(budget * BYTES), dict(LINEAR)
    stacks = [stack_of(adapters), stack_of(adapters)]
    weights = [torch.randn(sum(QKV), WIDE) for _ in stacks]
    for act, slots, number in history:
        if act == "load":
            for stack in stacks:
                load(stack, adapters, slots[0], seed=number)
        elif act == "drop":
            backend.drop()
        else:
            batch = plan([1 + number % 7, 1, 2], [slots[0], slots[1], None])[1]
            for stack, weight in zip(stacks, weights, strict=True):
                run(backend, weight, stack, adapters, batch)
        held = [copy.merged.nbytes for copies in backend.kept._copies.values() for copy in copies.values()]
        assert sum(held) == backend.kept.held_bytes <= backend.kept.max_bytes <= budget * BYTES
        assert all(backend.kept.dominates(slot) for slot, copies in backend.kept._copies.items() if copies)


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_merged_on_cuda(mix: Mix, dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    x, weight, stack, batch, expected = wide_case(dtype, mix, "cuda")
    backend = Merged(2 * weight.nbytes)
    for _ in range(40):
        backend.observe(batch)
    for _ in range(2):  # scratch and new copies, then kept copies
        assert relative_error(backend.linear(x, weight, None, stack, batch), expected) <= tolerance
    assert (backend.kept.held_bytes > 0) == any(backend.kept.dominates(slot) for slot in RANKS if any(RANKS[slot]))
    bias = torch.randn(weight.shape[0], device="cuda", dtype=dtype)
    with_bias = backend.linear(x, weight, bias, stack, batch)
    assert relative_error(with_bias, expected + bias.cpu().double()) <= tolerance


@pytest.mark.gpu
def test_drop_gives_device_memory_back() -> None:
    x, weight, stack, batch, _ = wide_case(torch.bfloat16, "identical", "cuda")
    Merged().linear(x, weight, None, stack, batch)  # cuBLAS takes its workspace at the first product
    backend = Merged(weight.nbytes)
    before = torch.cuda.memory_allocated()
    for _ in range(40):
        backend.observe(batch)
    backend.linear(x, weight, None, stack, batch)
    assert torch.cuda.memory_allocated() >= before + weight.nbytes
    assert backend.drop() == weight.nbytes
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_a_captured_graph_follows_the_slots_weights_and_not_a_kept_copy() -> None:
    x, weight, stack, batch, expected = wide_case(torch.bfloat16, "identical", "cuda")
    backend = Merged(weight.nbytes)
    for _ in range(40):
        backend.observe(batch)
    backend.linear(x, weight, None, stack, batch)
    assert backend.kept.held_bytes == weight.nbytes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.linear(x, weight, None, stack, batch)
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(y, expected) <= 3e-3
    stack.b.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(y, functional.linear(x, weight).cpu().double()) <= 3e-3
