"""The merge kernel against float64: all slots of a launch, uneven widths, ranks below the pool's."""

import pytest
import torch
from torch.testing import assert_close

from ranklet.kernels import merge
from tests.kernels import oracle
from tests.kernels.adapters import NAN, RANKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(slots: list[int], wide: int, widths: tuple[int, ...], dtype: torch.dtype, rank: int = 64) -> None:
    ranks = {slot: of[: len(widths)] for slot, of in RANKS.items() if max(of) <= rank}
    adapters = oracle.random_adapters(ranks, wide, widths, dtype=dtype)
    stack = oracle.linear_stack(adapters, 6, rank, wide, widths, stale=NAN, device=DEVICE)
    terms = oracle.give_terms(stack, slots[:1])
    weight = torch.randn(sum(widths), wide).to(dtype)
    out = torch.full((len(slots) + 1, *weight.shape), NAN, dtype=dtype, device=DEVICE)
    merge.merge(out, weight.to(DEVICE), stack, slots)
    for slot, merged in zip(slots, out.cpu(), strict=False):
        wanted = oracle.linear(torch.eye(wide), weight, None, [slot] * wide, adapters).t() * terms[slot, 0, :, None]
        assert_close(merged.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[len(slots)].isnan().all(), "only the given slots are written"


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize(
    ("slots", "wide", "widths"),
    [
        ([4], 128, (64, 64, 64)),
        ([3, 0, 5, 1], 40, (24, 8, 8)),
        ([1, 4], 200, (72, 136)),
        ([2, 1, 0], 130, (100,)),
    ],
    ids=["whole blocks", "narrow, one not targeted", "two slices", "one slice"],
)
def test_merges(slots: list[int], wide: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    check(slots, wide, widths, dtype)


@pytest.mark.gpu
def test_two_ranks_and_two_dtypes_in_one_process() -> None:
    for _ in range(2):
        for rank in (16, 64):
            for dtype in TOLERANCE:
                check([0, 2], 1024, (256, 128, 128), dtype, rank)
