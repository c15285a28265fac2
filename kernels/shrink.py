"""The first half of LoRA for every adapter of a batch in one launch: `s A x`.

Letters as in `stack.py`; T rows (tokens) of the batch. After SGLang's csgmv and Punica's SGMV.
"""

import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import launch_fitted, precision_of
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import ShrinkTile


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def shrink_kernel(
    x, a, h, tiles, ranks, scalings, meta_stride, K, x_stride, a_slot_stride, h_stride, h_split_stride,
    R: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if start >= stop:
        return
    rows = start + tl.arange(0, BLOCK_M)
    in_rows = (rows < stop)[:, None]
    r = tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
    a_at = a + slot.to(tl.int64) * a_slot_stride + r[None, :] * K + ks[:, None]
    rank0 = tl.load(ranks + slot * meta_stride)
    rank1 = tl.load(ranks + slot * meta_stride + 1) if SLICES > 1 else 0
    rank2 = tl.load(ranks + slot * meta_stride + 2) if SLICES > 2 else 0
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    share = tl.cdiv(tl.cdiv(K, SPLIT), BLOCK_K) * BLOCK_K
    low = split * share
    for k in tl.range(low, tl.minimum(low + share, K), BLOCK_K, num_stages=STAGES):
        in_x = in_rows if EVEN_K else in_rows & (k + ks < K)[None, :]
        in_k = (k + ks < K)[:, None]
        xs = tl.load(x_at + k, mask=in_x, other=0.0)
        acc0 = tl.dot(
            xs, tl.load(a_at + k, mask=in_k & (r < rank0)[None, :], other=0.0), acc0, input_precision=PRECISION
        )
        if SLICES > 1:
            acc1 = tl.dot(
                xs,
                tl.load(a_at + R * K + k, mask=in_k & (r < rank1)[None, :], other=0.0),
                acc1,
                input_precision=PRECISION,
            )
        if SLICES > 2:
            acc2 = tl.dot(
                xs,
                tl.load(a_at + 2 * R * K + k, mask=in_k & (r < rank2)[None, :], other=0.0),
                acc2,
                input_precision=PRECISION,
            )
    out = h + split * h_split_stride + rows.to(tl.int64)[:, None] * h_stride + r[None, :]
    mask = in_rows & (r < R)[None, :]
    scale = scalings + slot * meta_stride
    tl.store(out, (acc0 * tl.load(scale)).to(h.dtype.element_ty), mask=mask)
    if SLICES > 1:
        tl.store(out + R, (acc1 * tl.load(scale + 1)).to(h.dtype.element_ty), mask=mask)
    if SLICES > 2:
        tl.store(out + 2 * R, (acc2 * tl.load(scale + 2)).to(h.dtype.element_ty), mask=mask)


def shrink(
    x: Tensor,  # [T, K], rows contiguous
    h: Tensor,  # [split, T, slices * R], split as in `tile`; float32 if split > 1
    stack: LinearStack,
    tiles: RowTiles,
    tile: ShrinkTile,
    *,
    chained: bool = False,
) -> None:
    """Multiply rows by their adapter's A and scaling, slices side by side. Overwrites the tiles' rows of `h`.

    K is divided into `tile.split` parts, one program each. The sum over the parts is the product.

    Semantics: `h[p, t, i * R + j] = s_i * sum of A[slot(t), i * R + j, k] x[t, k] over the k of part p`.

    Args:
        chained: let the next launch on the stream start before this one ends (programmatic dependent launch). The next
            kernel must wait before it reads `h`.
    """
    assert tiles.on_device is not None
    table = tiles.on_device[0]
    wide, block_k = x.shape[1], min(tile.block_k, triton.next_power_of_2(x.shape[1]))
    block_r = triton.next_power_of_2(stack.rank)

    def launch(stages: int) -> None:
        shrink_kernel[(len(tiles.table), tile.split)](
            x, stack.a, h, table, stack.ranks, stack.scalings, stack.ranks.stride(0), wide, x.stride(0),
            stack.a.stride(0), h.stride(1), h.stride(0), R=stack.rank, SLICES=len(stack.widths), BLOCK_M=tiles.height,
            BLOCK_R=block_r, BLOCK_K=block_k, SPLIT=tile.split, EVEN_K=wide % (block_k * tile.split) == 0,
            STAGES=stages, PRECISION=precision_of(x), CHAINED=chained, num_warps=tile.warps, launch_pdl=chained,
            maxnreg=tile.registers or None,
        )  # fmt: skip

    launch_fitted(launch, tile.stages, (shrink_kernel, tile, tiles.height, block_r, len(stack.widths), x.dtype))
