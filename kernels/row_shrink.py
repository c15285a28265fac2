"""The first half of LoRA for a short batch, `s A x` for every adapter: one program for 16 rows and 16 ranks.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import precision_of
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.stack import LinearStack


class _Launch(NamedTuple):
    warps: int
    block_k: int
    stages: int


_BLOCK_ROWS = 16
_BLOCK_RANKS = 16
_SHORT, _MOST_SHORT = _Launch(4, 256, 1), 3072  # up to this K
_LONG = _Launch(8, 128, 3)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def row_shrink_kernel(
    x, a, h, tiles, scalings, meta_stride, x_stride, a_slot_stride, h_stride,
    K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, HEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // (HEIGHT // BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # rows of A, slices side by side
    start = tl.load(tiles + tile * 3) + tl.program_id(0) % (HEIGHT // BLOCK_M) * BLOCK_M
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    in_rows = (rows < stop)[None, :, None]
    in_a = start < stop
    SPAN: tl.constexpr = ((K + PARTS - 1) // PARTS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    EVEN: tl.constexpr = SPAN * PARTS == K
    ks = tl.arange(0, PARTS)[:, None, None] * SPAN + tl.arange(0, BLOCK_K)[None, None, :]
    x_at = x + rows[None, :, None] * x_stride + ks
    a_at = a + slot * a_slot_stride + (r * K)[None, :, None] + ks
    weight = tl.load(a_at, mask=in_a if EVEN else in_a & (ks < K), other=0.0)
    scaling = tl.load(scalings + slot * meta_stride + r // R)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next launch reads x without waiting
    if start >= stop:
        return
    acc = tl.zeros((PARTS, BLOCK_M, BLOCK_R), tl.float32)
    xs = tl.load(x_at, mask=in_rows if EVEN else in_rows & (ks < K), other=0.0)
    acc = tl.dot(xs, tl.permute(weight, (0, 2, 1)), acc, input_precision=PRECISION)
    for k in tl.range(BLOCK_K, SPAN, BLOCK_K, num_stages=STAGES):
        xs = tl.load(x_at + k, mask=in_rows if EVEN else in_rows & (ks + k < K), other=0.0)
        weight = tl.load(a_at + k, mask=in_a if EVEN else in_a & (ks + k < K), other=0.0)
        acc = tl.dot(xs, tl.permute(weight, (0, 2, 1)), acc, input_precision=PRECISION)
    hidden = (tl.sum(acc, 0) * scaling[None, :]).to(h.dtype.element_ty)
    at = h + rows[:, None] * h_stride + r[None, :]
    tl.store(at, hidden, mask=(rows < stop)[:, None])


def row_shrink(
    x: Tensor,  # [T, K], rows contiguous
    stack: LinearStack,
    tiles: RowTiles,
    *,
    chained: bool = False,
) -> Tensor:
    """Multiply rows by their adapter's A and scaling, slices side by side. Returns a new tensor [T, slices * R].

    Only the tiles' rows are written. Slots must be zero beyond their adapter's rank.

    Args:
        chained: as in `shrink`.
    """
    assert tiles.on_device is not None
    wide = x.shape[1]
    h = torch.empty((x.shape[0], stack.a.shape[1]), dtype=x.dtype, device=x.device)
    launch = _SHORT if wide <= _MOST_SHORT else _LONG
    block_k = max(16, min(launch.block_k, triton.next_power_of_2(wide // launch.warps)))
    row_shrink_kernel[(len(tiles.table) * (tiles.height // _BLOCK_ROWS), h.shape[1] // _BLOCK_RANKS)](
        x, stack.a, h, tiles.on_device[0], stack.scalings, stack.scalings.stride(0), x.stride(0), stack.a.stride(0),
        h.stride(0), K=wide, R=stack.rank, BLOCK_R=_BLOCK_RANKS, BLOCK_M=_BLOCK_ROWS,
        HEIGHT=tiles.height, BLOCK_K=block_k, PARTS=launch.warps, STAGES=launch.stages, PRECISION=precision_of(x),
        CHAINED=chained, num_warps=launch.warps, num_stages=launch.stages, launch_pdl=chained,
    )  # fmt: skip
    return h
