"""The torch backend against LoRA in float64, with NaN in the unused parts of stacks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from ranklet.kernels import native
from ranklet.kernels.batch import plan
from ranklet.kernels.mixes import MIXES, Mix, assign
from ranklet.kernels.stack import SlotMeta
from tests.kernels import oracle
from tests.kernels.adapters import LINEAR, NAN, QKV, RANK, RANKS, SLOTS, WIDE

VOCAB = 50
EMBEDDING = oracle.random_adapters({slot: ranks[:1] for slot, ranks in RANKS.items()}, VOCAB, (24,), seed=1)


@dataclass(frozen=True)
class Rows:
    """Requests of a batch."""

    lengths: list[int]
    slots: list[int | None]

    @property
    def by_row(self) -> list[int | None]:
        order, _ = plan(self.lengths, self.slots)
        return [self.slots[i] for i in order for _ in range(self.lengths[i])]


def check_linear(
    rows: Rows, *, bias: bool = False, widths: Sequence[int] = QKV, adapters: oracle.Adapters = LINEAR
) -> None:
    _, batch = plan(rows.lengths, rows.slots)
    x, weight = torch.randn(batch.rows, WIDE), torch.randn(sum(widths), WIDE) * WIDE**-0.5
    offset = torch.randn(sum(widths)) if bias else None
    stack = oracle.linear_stack(adapters, SLOTS, RANK, WIDE, widths, stale=NAN)
    y = native.linear(x, weight, offset, stack, batch)
    assert_close(y.double(), oracle.linear(x, weight, offset, rows.by_row, adapters), rtol=1e-5, atol=1e-5)
    base = [t for t, slot in enumerate(rows.by_row) if slot is None or not any(RANKS[slot])]
    assert_close(y[base], functional.linear(x, weight, offset)[base], rtol=1e-6, atol=1e-6)


def check_embedding(rows: Rows) -> None:
    _, batch = plan(rows.lengths, rows.slots)
    ids, table = torch.randint(VOCAB, (batch.rows,), dtype=torch.int32), torch.randn(VOCAB, 24)
    stack = oracle.embedding_stack(EMBEDDING, SLOTS, RANK, VOCAB, 24, stale=NAN)
    y = native.embedding(ids, table, stack, batch)
    assert_close(y.double(), oracle.embedding(ids, table, rows.by_row, EMBEDDING), rtol=1e-5, atol=1e-5)
    base = [t for t, slot in enumerate(rows.by_row) if slot is None or not RANKS[slot][0]]
    assert torch.equal(y[base], table[ids[base]])


batches = st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, SLOTS - 1)), max_size=12).map(
    lambda made: Rows([length for length, _ in made], [slot for _, slot in made])
)


@settings(max_examples=60)
@given(batches, st.booleans())
def test_linear_on_any_batch(rows: Rows, bias: bool) -> None:
    check_linear(rows, bias=bias)


@settings(max_examples=60)
@given(batches)
def test_embedding_on_any_batch(rows: Rows) -> None:
    check_embedding(rows)


@pytest.mark.parametrize("mix", MIXES)
def test_the_four_mixes(mix: Mix) -> None:
    rows = Rows([1 + i % 5 for i in range(24)], list(assign(mix, 24, 5)))
    check_linear(rows, bias=True)
    check_embedding(rows)


@pytest.mark.parametrize(
    "rows",
    [
        Rows([], []),
        Rows([0, 0], [1, None]),
        Rows([1], [3]),
        Rows([1, 1, 1, 1, 1], [4, 3, 2, 1, 0]),  # many adapters of one row
        Rows([3, 2], [None, None]),
        Rows([7], [5]),  # an adapter that does not target the projection
    ],
    ids=["no requests", "empty runs", "one row", "a row each", "base only", "not targeted"],
)
def test_unusual_batches(rows: Rows) -> None:
    check_linear(rows)
    check_embedding(rows)


def test_a_projection_of_one_slice() -> None:
    one = {slot: loras[:1] for slot, loras in LINEAR.items()}
    check_linear(Rows([3, 1, 2], [1, 4, None]), widths=QKV[:1], adapters=one)


def test_an_adapter_changes_only_its_own_rows() -> None:
    rows = Rows([3, 4, 2], [2, 4, None])
    _, batch = plan(rows.lengths, rows.slots)
    x, weight = torch.randn(batch.rows, WIDE), torch.randn(sum(QKV), WIDE)
    stack = oracle.linear_stack(LINEAR, SLOTS, RANK, WIDE, QKV, stale=NAN)
    before = native.linear(x, weight, None, stack, batch)
    stack.a[2].fill_(NAN)
    after = native.linear(x, weight, None, stack, batch)
    assert after[:3].isnan().all()
    assert torch.equal(after[3:], before[3:])


def test_shrink_leaves_out_padding_and_untargeted_slices() -> None:
    stack = oracle.linear_stack(LINEAR, SLOTS, RANK, WIDE, QKV, stale=NAN)
    x = torch.randn(5, WIDE)
    hidden = native.shrink(x, stack, 1)
    assert hidden.shape == (5, 3 + 8)
    expected = torch.cat([x.double() @ lora.a.double().t() for lora in LINEAR[1]], dim=1)
    assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_native_on_cuda(mix: Mix, dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    wide, widths = 1024, (512, 256, 256)
    adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
    rows = Rows([1 + 7 * (i % 9) for i in range(40)], [*assign(mix, 36, 5), None, None, None, None])
    _, batch = plan(rows.lengths, rows.slots)
    x = torch.randn(batch.rows, wide).to(dtype)
    weight = (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    stack = oracle.linear_stack(adapters, SLOTS, RANK, wide, widths, stale=NAN, device="cuda")
    y = native.linear(x.cuda(), weight.cuda(), None, stack, batch).cpu()
    assert_close(y.double(), oracle.linear(x, weight, None, rows.by_row, adapters), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_native_embedding_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    adapters = oracle.random_adapters({0: (8,), 1: (64,), 2: (3,)}, 500, (128,), dtype=dtype)
    rows = Rows([5, 60, 1, 9], [0, 1, 2, None])
    _, batch = plan(rows.lengths, rows.slots)
    ids, table = torch.randint(500, (batch.rows,), dtype=torch.int32), torch.randn(500, 128).to(dtype)
    stack = oracle.embedding_stack(adapters, 4, RANK, 500, 128, stale=NAN, device="cuda")
    y: Tensor = native.embedding(ids.cuda(), table.cuda(), stack, batch).cpu()
    assert_close(y.double(), oracle.embedding(ids, table, rows.by_row, adapters), rtol=tolerance, atol=tolerance)


def test_each_slice_has_its_own_scaling() -> None:
    rows, x, weight = Rows([4], [2]), torch.randn(4, WIDE), torch.zeros(sum(QKV), WIDE)
    _, batch = plan(rows.lengths, rows.slots)
    stack = oracle.linear_stack(LINEAR, SLOTS, RANK, WIDE, QKV, stale=NAN)
    stack.describe(2, SlotMeta(RANKS[2], (1.0, 1.0, 1.0)))
    once = native.linear(x, weight, None, stack, batch)
    stack.describe(2, SlotMeta(RANKS[2], (1.0, 2.0, math.pi)))
    factors = torch.tensor([1.0] * 24 + [2.0] * 8 + [math.pi] * 8)
    assert_close(native.linear(x, weight, None, stack, batch), once * factors)
