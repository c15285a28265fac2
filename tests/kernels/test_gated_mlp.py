"""Gate, up and activation in one product, against float64: interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from ranklet.kernels import base_gemm, csgmv, dispatch, gated_mlp
from ranklet.kernels.batch import cut, plan
from ranklet.kernels.shrink import shrink
from ranklet.kernels.tiles import ShrinkTile
from tests.kernels import oracle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "wide", "width"), [(1, 64, 128), (128, 128, 256), (300, 192, 128), (129, 64, 384)])
def test_gated_is_the_activation_of_the_product(rows: int, wide: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, wide).to(dtype), (torch.randn(2 * width, wide) * wide**-0.5).to(dtype)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    wanted = functional.silu(gate) * up
    found = gated_mlp.gated(x.to(DEVICE), weight.to(DEVICE)).cpu().double()
    error = 2e-3 if dtype == torch.bfloat16 else 3e-4  # one rounding
    assert (found - wanted).norm() <= error * wanted.norm()


@pytest.mark.gpu
def test_gated_supports_only_many_rows_of_16_bits_and_whole_blocks() -> None:
    hopper = torch.cuda.get_device_capability()[0] >= 9
    for rows, wide, width, dtype, expected in (
        (4096, 1024, 3072, torch.bfloat16, hopper),
        (1024, 1024, 3072, torch.bfloat16, False),
        (4096, 1024, 3072, torch.float32, False),
        (4096, 1000, 3072, torch.bfloat16, False),
        (4096, 1024, 3000, torch.bfloat16, False),
    ):
        x = torch.empty(rows, wide, dtype=dtype, device="cuda")
        assert gated_mlp.can_gate(x, torch.empty(2 * width, wide, dtype=dtype, device="cuda")) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [([300], [3]), ([200, 90, 40], [4, 2, None]), ([150, 140, 130, 120], [1, 3, 5, 4])],
    ids=["one adapter", "with base rows", "blocks of several segments"],
)
def test_gated_adds_lora_before_the_activation(
    lengths: list[int], slots: list[int | None], rank: int, padded: bool, dtype: torch.dtype
) -> None:
    wide, width = 192, 256
    order, batch = plan(lengths, slots)
    ranks = {1: (3, 0), 2: (8, 8), 3: (rank, rank), 4: (rank, 5), 5: (0, 0)}
    adapters = oracle.random_adapters(ranks, wide, (width, width), dtype=dtype)
    stack = oracle.linear_stack(adapters, 6, rank, wide, (width, width), stale=0.0, device=DEVICE.type)
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(2 * width, wide) * wide**-0.5).to(dtype)
    (tiles,) = cut(batch, padded=padded)
    assert gated_mlp.can_add(stack, (tiles,))
    on_device = tiles.to(DEVICE)
    h = torch.full((1, batch.rows, 2 * rank), torch.nan, dtype=dtype, device=DEVICE)
    shrink(x.to(DEVICE), h, stack, on_device, ShrinkTile(64, 1, 4, 2))
    rows = [slots[i] for i in order for _ in range(lengths[i])]
    product = oracle.linear(x, weight, None, rows, adapters)
    given = oracle.give_terms(stack, (3, 5))
    for terms in (None, stack.terms):
        y = gated_mlp.gated(x.to(DEVICE), weight.to(DEVICE), h, stack, on_device, terms=terms).cpu().double()
        gate, up = (product if terms is None else oracle.with_terms(product, rows, given)).chunk(2, dim=1)
        wanted = functional.silu(gate) * up
        error = 3e-3 if dtype == torch.bfloat16 else 4e-4  # h and the output are rounded
        assert (y - wanted).norm() <= error * wanted.norm()


def test_gated_adds_lora_only_of_low_rank_to_tiles_of_one_height_with_few_adapters_a_block() -> None:
    for rank, lengths, expected in (
        (16, [2048], True),
        (32, [512] * 8, True),
        (64, [2048], False),
        (16, [2048, 7], False),
        (16, [13] * 40, False),
    ):
        stack = oracle.linear_stack({}, 6, rank, 64, (128, 128), stale=0.0)
        _, batch = plan(lengths, list(range(len(lengths))))
        assert gated_mlp.can_add(stack, cut(batch)) == expected


@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("lengths", "slots"), [([6, 20, 3], [4, 2, None]), ([70, 5], [3, 5])])
def test_batches_of_few_rows_get_the_same_activation(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], slots: list[int | None], padded: bool, widens: bool
) -> None:
    wide, width, dtype = 40, 24, torch.float16
    order, batch = plan(lengths, slots)
    ranks = {2: (8, 8), 3: (40, 0), 4: (16, 5), 5: (0, 0)}
    adapters = oracle.random_adapters(ranks, wide, (width, width), dtype=dtype)
    stack = oracle.linear_stack(adapters, 6, 64, wide, (width, width), stale=float("nan"), device=DEVICE.type)
    x, weight = torch.randn(batch.rows, wide).to(dtype), (torch.randn(2 * width, wide) * wide**-0.5).to(dtype)
    monkeypatch.setattr(base_gemm, "may_widen", lambda x: widens)
    monkeypatch.setattr(base_gemm, "widened", lambda x, weight, bias: x.float() @ weight.float().t())
    tiles = tuple(kind.to(DEVICE) for kind in cut(batch, padded=padded))
    chosen = replace(batch, implementation=csgmv, tiles=tiles, padded=padded)
    found = dispatch.gated(x.to(DEVICE), weight.to(DEVICE), None, stack, chosen).cpu()
    rows = [slots[i] for i in order for _ in range(lengths[i])]
    gate, up = oracle.linear(x, weight, None, rows, adapters).chunk(2, dim=1)
    wanted = functional.silu(gate) * up
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= (5e-4 if widens else 1e-3) * wanted.norm()
