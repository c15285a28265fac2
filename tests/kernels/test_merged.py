"""The merging backend against LoRA in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ranklet.kernels import merge, native
from ranklet.kernels.batch import LoraBatch, plan
from ranklet.kernels.merged import Merged
from ranklet.kernels.mixes import MIXES, Mix, assign
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import LinearStack, SlotMeta
from tests.kernels import oracle
from tests.kernels.adapters import LINEAR, NAN, QKV, RANK, RANKS, SLOTS, WIDE, batch_of, slots_by_row, stack_of

DTYPES = [(torch.float32, 2e-5), (torch.float16, 5e-4), (torch.bfloat16, 3e-3)]

requests = st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, SLOTS - 1)), max_size=12)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected).norm() / expected.norm())


def check_linear(batch: LoraBatch, *, bias: bool = False) -> None:
    x, weight = torch.randn(batch.rows, WIDE), torch.randn(sum(QKV), WIDE) * WIDE**-0.5
    offset = torch.randn(sum(QKV)) if bias else None
    before = weight.clone()
    y = Merged().linear(x, weight, offset, stack_of(LINEAR), batch)
    assert_close(y.double(), oracle.linear(x, weight, offset, slots_by_row(batch), LINEAR), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight, before)
    base = [t for t, slot in enumerate(slots_by_row(batch)) if slot is None or not any(RANKS[slot])]
    assert_close(y[base], functional.linear(x, weight, offset)[base], rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(requests, st.booleans())
def test_linear_on_any_batch(made: list[tuple[int, int | None]], bias: bool) -> None:
    check_linear(plan([length for length, _ in made], [slot for _, slot in made])[1], bias=bias)


@pytest.mark.parametrize(
    "batch",
    [
        LoraBatch((), rows=0),
        LoraBatch((), rows=3),
        batch_of(3, rows=1),
        plan([1] * 5, [4, 3, 2, 1, 0])[1],
        batch_of(5, rows=7),
        LoraBatch((Segment(5, 0, 2), Segment(2, 2, 4), Segment(1, 4, 4), Segment(5, 4, 6)), rows=8),
    ],
    ids=[
        "no rows",
        "base only",
        "one row",
        "a row each",
        "not targeted",
        "base rows between adapters and an empty segment",
    ],
)
def test_unusual_batches(batch: LoraBatch) -> None:
    check_linear(batch)
    check_linear(batch, bias=True)


@pytest.mark.parametrize("mix", MIXES)
def test_the_four_mixes(mix: Mix) -> None:
    check_linear(plan([1 + i % 5 for i in range(24)], assign(mix, 24, 5))[1], bias=True)


def wide_case(dtype: torch.dtype, mix: Mix, device: str) -> tuple[Tensor, Tensor, LinearStack, LoraBatch, Tensor]:
    """Return input, weight, stack, batch and the output in float64, of a realistic width."""
    wide, widths = 1024, (256, 128, 128)
    adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
    slots: list[int | None] = [*assign(mix, 28, 6), None, None]
    _, batch = plan([1 + 5 * (i % 7) for i in range(30)], slots)
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    expected = oracle.linear(x, weight, None, slots_by_row(batch), adapters)
    return x.to(device), weight.to(device), stack_of(adapters, wide, widths, device), batch, expected


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_error_relative_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, stack, batch, expected = wide_case(dtype, "uniform", "cpu")
    assert relative_error(Merged().linear(x, weight, None, stack, batch), expected) <= tolerance


def test_dtypes_and_shapes_do_not_share_scratch() -> None:
    backend = Merged()
    for dtype, tolerance in (*DTYPES, *DTYPES):
        for widths, wide in ((QKV, WIDE), ((20, 10, 10), WIDE), ((24, 8, 8), 56), ((16, 16, 24), WIDE)):
            adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
            _, batch = plan([3, 2, 4, 1], [1, 4, 3, None])
            x, weight = torch.randn(10, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
            y = backend.linear(x, weight, None, stack_of(adapters, wide, widths), batch)
            assert y.dtype == dtype
            assert relative_error(y, oracle.linear(x, weight, None, slots_by_row(batch), adapters)) <= tolerance


def test_scratch_allocated_in_inference_mode_is_usable_outside() -> None:
    backend, x, weight, stack = Merged(), torch.randn(4, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    with torch.inference_mode():
        inside = backend.linear(x, weight, None, stack, batch_of(2))
    assert torch.equal(backend.linear(x, weight, None, stack, batch_of(2)), inside)


def test_scratch_holds_at_most_the_weights_of_one_launch() -> None:
    backend, x, weight, stack = Merged(), torch.randn(5, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    for slots, held in (([0, 1], 2), ([3], 2), ([4, 3, 2, 1, 0], merge.AT_ONCE)):
        _, batch = plan([1] * len(slots), slots)
        backend.linear(x[: batch.rows], weight, None, stack, batch)
        assert backend.scratch_bytes == held * weight.nbytes


def test_each_slice_has_its_own_scaling() -> None:
    x, weight, stack = torch.randn(4, WIDE), torch.zeros(sum(QKV), WIDE), stack_of(LINEAR)
    stack.describe(2, SlotMeta((8, 8, 8), (1.0, 1.0, 1.0)))
    once = Merged().linear(x, weight, None, stack, batch_of(2))
    stack.describe(2, SlotMeta((8, 8, 8), (1.0, 2.0, -0.3)))
    factors = torch.tensor([1.0] * 24 + [2.0] * 8 + [-0.3] * 8)
    assert_close(Merged().linear(x, weight, None, stack, batch_of(2)), once * factors)


def test_an_adapter_changes_only_its_own_rows() -> None:
    _, batch = plan([3, 4, 2], [2, 4, None])
    x, weight, stack = torch.randn(9, WIDE), torch.randn(sum(QKV), WIDE), stack_of(LINEAR)
    before = Merged().linear(x, weight, None, stack, batch)
    stack.a[2].fill_(NAN)
    after = Merged().linear(x, weight, None, stack, batch)
    assert after[:3].isnan().all()
    assert torch.equal(after[3:], before[3:])


def test_an_input_with_other_rows_than_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4, the rows of the batch, got 5"):
        Merged().linear(torch.randn(5, WIDE), torch.randn(sum(QKV), WIDE), None, stack_of(LINEAR), batch_of(2))


def test_the_embedding_agrees_with_native() -> None:
    adapters = oracle.random_adapters({2: (8,)}, 50, (24,))
    stack = oracle.embedding_stack(adapters, SLOTS, RANK, 50, 24, stale=NAN)
    ids, table = torch.randint(50, (4,)), torch.randn(50, 24)
    expected = native.embedding(ids, table, stack, batch_of(2))
    assert torch.equal(Merged().embedding(ids, table, stack, batch_of(2)), expected)


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
    for _ in range(2):  # scratch and new merges, then kept merges
        assert relative_error(backend.linear(x, weight, None, stack, batch), expected) <= tolerance
    assert (backend.kept.held_bytes > 0) == any(backend.kept.dominates(slot) for slot in RANKS if any(RANKS[slot]))
    bias = torch.randn(weight.shape[0], device="cuda", dtype=dtype)
    with_bias = backend.linear(x, weight, bias, stack, batch)
    assert relative_error(with_bias, expected + bias.cpu().double()) <= tolerance


@pytest.mark.gpu
def test_drop_frees_device_memory() -> None:
    x, weight, stack, batch, _ = wide_case(torch.bfloat16, "identical", "cuda")
    Merged().linear(x, weight, None, stack, batch)  # cuBLAS allocates its workspace at the first product
    backend = Merged(weight.nbytes)
    before = torch.cuda.memory_allocated()
    for _ in range(40):
        backend.observe(batch)
    backend.linear(x, weight, None, stack, batch)
    assert torch.cuda.memory_allocated() >= before + weight.nbytes
    assert backend.drop() == weight.nbytes
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_slots_weights_and_no_kept_merge() -> None:
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
