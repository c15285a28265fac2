"""Keys and values reach their slots, whichever backend computes the projection, and other slots stay untouched."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ranklet.kernels import csgmv, dispatch, native
from ranklet.kernels.batch import Backend, plan
from ranklet.kernels.kv_write import KvWrite, write_kv, write_kv_triton
from ranklet.kernels.rotary import Rotary
from tests.kernels import oracle
from tests.kernels.paged import check_stored, make_kv_write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(kv: KvWrite) -> KvWrite:
    return KvWrite(kv.slots.to(DEVICE), type(kv.pages)(*(part.to(DEVICE) for part in kv.pages)))


@pytest.mark.parametrize("run", [write_kv, write_kv_triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((3, 1), 6), ((2, 2), 64)])
def test_writes_only_the_slots(
    run: Callable[..., None], dtype: torch.dtype, heads: tuple[int, int], width: int
) -> None:
    kv = on_device(make_kv_write(9, heads[1], width, dtype))
    qkv = torch.randn(9, (heads[0] + 2 * heads[1]) * width).to(dtype).to(DEVICE)
    run(qkv, kv.slots, kv.pages, heads)
    check_stored(qkv, kv)


@pytest.mark.parametrize("implementation", [None, native, csgmv])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_backend_stores_what_it_returns(implementation: Backend | None, dtype: torch.dtype) -> None:
    queries, keys, width, wide = 4, 2, 16, 32
    widths = (queries * width, keys * width, keys * width)
    adapters = oracle.random_adapters({0: (8, 8, 8), 1: (4, 0, 4)}, wide, widths, dtype=dtype)
    stack = oracle.linear_stack(adapters, 2, 16, wide, widths, stale=0.0, device=str(DEVICE))
    _, batch = plan([5, 1, 30, 2], [1, 0, 1, None])
    batch = replace(batch.with_tiles(DEVICE), implementation=implementation)
    kv = on_device(make_kv_write(batch.rows, keys, width, dtype))
    angle = torch.rand(50, width // 2)
    rotary = Rotary(
        None, angle.cos().to(DEVICE), angle.sin().to(DEVICE), torch.arange(batch.rows, device=DEVICE), queries, keys,
        1e-6, kv,
    )  # fmt: skip
    x, weight = torch.randn(batch.rows, wide).to(dtype), torch.randn(sum(widths), wide).to(dtype)
    qkv = dispatch.rotated(x.to(DEVICE), weight.to(DEVICE), None, stack, batch, rotary)
    check_stored(qkv, kv)
