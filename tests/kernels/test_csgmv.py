"""The Triton backend against LoRA in float64: interpreted on the CPU, compiled on a GPU.

bfloat16 is tested on the GPU only: the interpreter's bfloat16 `tl.dot` returns garbage.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ranklet.kernels import base_gemm, csgmv, fused_gemm
from ranklet.kernels.batch import cut, plan
from ranklet.kernels.mixes import MIXES, Mix, assign
from ranklet.kernels.tiles import FusedTile
from tests.kernels import oracle
from tests.kernels.adapters import NAN, RANKS
from tests.kernels.fixed_tiles import fuse_small_batches

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def by_row(lengths: list[int], slots: list[int | None]) -> list[int | None]:
    order, _ = plan(lengths, slots)
    return [slots[i] for i in order for _ in range(lengths[i])]


def check(
    lengths: list[int], slots: list[int | None], *, wide: int = 40, widths: tuple[int, ...] = (24, 8, 8),
    dtype: torch.dtype = torch.float32, bias: bool = False, stale: float = NAN, everywhere: bool = False,
    terms: Sequence[int] = (),
) -> None:  # fmt: skip
    _, batch = plan(lengths, slots)
    batch = replace(batch, everywhere=everywhere, terms=bool(terms))
    ranks = {slot: of[: len(widths)] for slot, of in RANKS.items()}
    adapters = oracle.random_adapters(ranks, wide, widths, dtype=dtype)
    x = torch.randn(batch.rows, wide).to(dtype)
    weight = (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    offset = torch.randn(sum(widths)).to(dtype) if bias else None
    stack = oracle.linear_stack(adapters, 6, 64, wide, widths, stale=stale, device=DEVICE)
    given = oracle.give_terms(stack, terms) if terms else None
    on = [None if t is None else t.to(DEVICE) for t in (x, weight, offset)]
    assert on[0] is not None
    assert on[1] is not None
    y = csgmv.linear(on[0], on[1], on[2], stack, batch.with_tiles(torch.device(DEVICE))).cpu()
    wanted = oracle.linear(x, weight, offset, by_row(lengths, slots), adapters)
    wanted = wanted if given is None else oracle.with_terms(wanted, by_row(lengths, slots), given)
    assert_close(y.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if batch.rows:
        assert (y.double() - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_the_four_mixes(mix: Mix, dtype: torch.dtype) -> None:
    check([1 + 7 * (i % 6) for i in range(14)], [*assign(mix, 12, 5), None, None], dtype=dtype, bias=True)


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ([], []),
        ([0, 0, 2], [1, None, 2]),
        ([1], [3]),
        ([1] * 6, [4, 3, 2, 1, 0, None]),
        ([3, 2], [None, None]),
        ([7], [5]),
        ([33, 70, 5], [1, 3, 5]),  # tall tiles, and an adapter that targets nothing
        ([200, 3, 40], [4, 2, None]),  # tall and short tiles in one batch
    ],
    ids=["nothing", "empty runs", "one row", "a row each", "base only", "not targeted", "tall", "mixed heights"],
)
def test_unusual_batches(lengths: list[int], slots: list[int | None]) -> None:
    check(lengths, slots)
    check(lengths, slots, widths=(24,), bias=True)
    check(lengths, slots, wide=72, widths=(40, 136))


@pytest.mark.parametrize("everywhere", [False, True])
def test_column_terms(everywhere: bool) -> None:
    """Of adapters beside plain ones and the base model, also where an adapter has no LoRA."""
    check([33, 7, 20, 5], [1, 3, 5, None], bias=True, everywhere=everywhere, terms=(1, 5))
    check([150, 3, 40, 9], [4, 2, 5, None], widths=(40, 136), everywhere=everywhere, terms=(2, 4, 5))
    check([5], [5], widths=(24,), dtype=torch.float16, everywhere=everywhere, terms=(5,))


@pytest.mark.parametrize("lengths", [[7], [150]])
def test_lora_that_no_adapter_has(lengths: list[int]) -> None:
    check(lengths, [5], everywhere=True)
    check(lengths, [5], widths=(24,), bias=True, everywhere=True)
    check([*lengths, 9], [5, None], dtype=torch.float16, stale=0.0, everywhere=True)


def test_hundreds_of_adapters_of_one_row() -> None:
    slots = list(range(0, 1000, 1 if DEVICE == "cuda" else 9))  # Triton's interpreter is slow
    lora = oracle.random_adapters(dict.fromkeys(slots, (4,)), 32, (16,))
    stack = oracle.linear_stack(lora, 1000, 16, 32, (16,), stale=NAN, device=DEVICE)
    _, batch = plan([1] * len(slots), slots)
    x, weight = torch.randn(len(slots), 32), torch.randn(16, 32)
    y = csgmv.linear(x.to(DEVICE), weight.to(DEVICE), None, stack, batch.with_tiles(torch.device(DEVICE))).cpu()
    wanted = oracle.linear(x, weight, None, slots, lora)  # scalings are up to 250
    assert ((y.double() - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [([150, 129, 7, 20], [4, 3, 2, None]), ([33, 70, 128, 64, 5], [1, 3, 5, 4, 2]), ([13] * 10, [0, 1, 2, 3, 4] * 2)],
    ids=["long, short and base", "blocks of several segments", "only short"],
)
def test_base_and_lora_from_one_product(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], slots: list[int | None], dtype: torch.dtype, bias: bool
) -> None:
    wide, widths = 512, (256, 128, 128)
    tile, product, heights = FusedTile(128, 64, 8, 1, 8, 3), fused_gemm.gemm, []

    def counted(*args: Any, **options: Any) -> None:
        heights.append(args[6].height)
        product(*args, **options)

    fuse_small_batches(monkeypatch, tile)
    monkeypatch.setattr(fused_gemm, "gemm", counted)
    check(lengths, slots, wide=wide, widths=widths, dtype=dtype, bias=bias, stale=0.0)
    check(lengths, slots, wide=wide, widths=widths[:1], dtype=dtype, bias=bias, stale=0.0)
    check(lengths, slots, wide=wide, widths=widths, dtype=dtype, bias=bias, stale=0.0, terms=(1, 4))
    expected = [tiles.height for tiles in cut(plan(lengths, slots)[1])] * 3
    assert heights == expected


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [([7, 20, 3], [1, 3, None]), ([33, 70, 5], [1, 3, 5]), ([6, 2], [4, 2]), ([200, 3, 40], [4, 2, None])],
    ids=["with base rows", "not targeted", "no base rows", "mixed heights"],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_base_product_kept_in_float32_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], slots: list[int | None], padded: bool, bias: bool
) -> None:
    def widened(x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        wide = x.float() @ weight.float().t()
        return wide if offset is None else wide + offset

    monkeypatch.setattr(base_gemm, "may_widen", lambda x: True)
    monkeypatch.setattr(base_gemm, "widened", widened)
    dtype, wide, widths = torch.float16, 40, (24, 8, 8)
    _, batch = plan(lengths, slots)
    adapters = oracle.random_adapters(RANKS, wide, widths, dtype=dtype)
    stack = oracle.linear_stack(adapters, 6, 64, wide, widths, stale=NAN, device=DEVICE)
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(sum(widths), wide) * wide**-0.5).to(dtype)
    offset = torch.randn(sum(widths)).to(dtype) if bias else None
    tiles = tuple(kind.to(torch.device(DEVICE)) for kind in cut(batch, padded=padded))
    given = (x.to(DEVICE), weight.to(DEVICE), None if offset is None else offset.to(DEVICE), stack)
    y = csgmv.linear(*given, replace(batch, tiles=tiles, padded=padded)).cpu()
    assert y.dtype == dtype
    wanted = oracle.linear(x, weight, offset, by_row(lengths, slots), adapters)
    assert (y.double() - wanted).norm() <= 6e-4 * wanted.norm()


def test_the_fused_product_supports_only_many_rows_of_16_bits_and_whole_blocks() -> None:
    tile = FusedTile(128, 64, 8, 1, 8, 3)
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    for wide, widths, dtype, segments, supported in (
        (512, (256, 128), torch.float16, 4, hopper),
        (512, (256, 128), torch.float16, 1024, False),  # too many adapters in a block
        (512, (256, 128), torch.float16, 0, False),  # few rows
        (512, (256, 100), torch.float16, 4, False),
        (500, (256, 128), torch.float16, 4, False),
        (512, (256, 128), torch.float32, 4, False),
    ):
        stack = oracle.linear_stack({}, 6, 64, wide, widths, stale=0.0, device=DEVICE)
        x = torch.empty(128, wide, dtype=dtype, device=DEVICE)
        lengths = [2048 // segments] * segments if segments else [1024]
        _, batch = plan(lengths, list(range(len(lengths))))
        (tiles,) = cut(batch)
        assert fused_gemm.can_fuse(x, stack, tiles, tile) == supported
        (padded,) = cut(batch, padded=True)
        assert fused_gemm.can_fuse(x, stack, padded, tile) == supported


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype, terms: bool) -> None:
    adapters = oracle.random_adapters({0: (8,), 1: (64,), 2: (3,), 3: (0,)}, 500, (136,), dtype=dtype)
    lengths, slots = [5, 60, 1, 4, 9], [0, 1, 2, 3, None]
    _, batch = plan(lengths, slots)
    ids, table = torch.randint(500, (batch.rows,), dtype=torch.int32), torch.randn(500, 136).to(dtype)
    stack = oracle.embedding_stack(adapters, 4, 64, 500, 136, stale=NAN, device=DEVICE)
    placed = replace(batch, terms=terms).with_tiles(torch.device(DEVICE))
    wanted = oracle.embedding(ids, table, by_row(lengths, slots), adapters)
    if terms:  # only adapters with LoRA have them
        own = torch.randn(4, 2, 136)
        own[3, 0], own[3, 1] = 1.0, 0.0
        stack.terms = own.to(DEVICE)
        for row, slot in enumerate(by_row(lengths, slots)):
            if slot is not None:
                wanted[row] = own[slot, 0].double() * wanted[row] + own[slot, 1].double()
    y = csgmv.embedding(ids.to(DEVICE), table.to(DEVICE), stack, placed).cpu()
    assert_close(y.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_two_ranks_and_two_dtypes_in_one_process() -> None:
    for dtype in (DTYPES[0], DTYPES[-1], DTYPES[0]):
        for rank in (16, 64, 16):
            adapters = oracle.random_adapters({0: (rank,)}, 48, (32,), dtype=dtype)
            stack = oracle.linear_stack(adapters, 1, rank, 48, (32,), stale=NAN, device=DEVICE)
            _, batch = plan([9], [0])
            x, weight = torch.randn(9, 48).to(dtype), torch.randn(32, 48).to(dtype)
            y = csgmv.linear(x.to(DEVICE), weight.to(DEVICE), None, stack, batch.with_tiles(torch.device(DEVICE))).cpu()
            wanted = oracle.linear(x, weight, None, [0] * 9, adapters)
            assert (y.double() - wanted).norm() <= 3e-3 * wanted.norm()
