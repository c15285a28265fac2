"""The base product with LoRA in its accumulator: y is written once, and rounded once.

For tall tiles on Hopper and later, where a pass over y costs more than a base product somewhat slower than cuBLAS's.
Letters as in `stack.py`, T rows. After Triton's persistent matmul tutorial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.batch import Tiles
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import FusedTile

HEIGHT = 128  # rows of the tiles it takes


@triton.jit(do_not_specialize=["count"])
def _gemm_kernel(
    x_tma, w_tma, h_tma, b_tma, y_tma, y, bias, tiles, count, N, y_stride,
    K: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns_of_blocks = tl.cdiv(N, BLOCK_N)
    per_group = GROUP * columns_of_blocks
    for block in tl.range(tl.program_id(0), count * columns_of_blocks, PROGRAMS):
        # Blocks of a group share rows of x and columns of W, which then come from the L2 cache.
        above = block // per_group * GROUP
        height = tl.minimum(count - above, GROUP)
        tile = above + block % per_group % height
        first = block % per_group // height * BLOCK_N
        start = tl.load(tiles + tile * 3)
        stop = tl.load(tiles + tile * 3 + 1)
        slot = tl.load(tiles + tile * 3 + 2)
        piece = (first >= W0).to(tl.int32) + (first >= W0 + W1).to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            acc = tl.dot(x_tma.load([start, k]), w_tma.load([first, k]).T, acc)
        lora_b = tl.reshape(b_tma.load([slot, first, 0]), (BLOCK_N, R))
        acc = tl.dot(h_tma.load([start, piece * R]), lora_b.T, acc)
        if BIAS:
            acc += tl.load(bias + first + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
        if stop - start == BLOCK_M:
            if HALVES == 1:
                y_tma.store([start, first], acc.to(y.dtype.element_ty))
            else:
                halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                y_tma.store([start, first], left.to(y.dtype.element_ty))
                y_tma.store([start, first + BLOCK_N // 2], right.to(y.dtype.element_ty))
        else:  # the last tile of a segment: the rows below it are another adapter's
            rows = start + tl.arange(0, BLOCK_M)
            at = y + rows.to(tl.int64)[:, None] * y_stride + (first + tl.arange(0, BLOCK_N))[None, :]
            tl.store(at, acc.to(y.dtype.element_ty), mask=(rows < stop)[:, None])


def gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, y: Tensor, stack: LinearStack, tiles: Tiles,
    tile: FusedTile,
) -> None:  # fmt: skip
    """Write base product and adapters' output of the tiles' rows, in one accumulator with one rounding.

    Semantics: `y[t] = W x[t] + bias + B[slot(t)] h[t, slice]`.

    Args:
        x: [T, K]; weight: [N, K]; bias: [N] or None; h: [1, T, slices * R] in x's dtype.
        y: [T, N]. Rows of no tile are left alone.
    """
    assert tiles.device is not None
    wide, rank, height, block_n = x.shape[1], stack.rank, tiles.height, tile.block_n
    width = weight.shape[0]
    programs = _processors(x)
    w0, w1 = (*stack.widths, width)[:2]
    _gemm_kernel[(min(programs, len(tiles.table) * triton.cdiv(width, block_n)),)](
        TensorDescriptor.from_tensor(x, [height, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, tile.block_k]),
        TensorDescriptor.from_tensor(h[0], [height, rank]),
        TensorDescriptor.from_tensor(stack.b, [1, block_n, rank]),
        TensorDescriptor.from_tensor(y, [height, block_n // tile.halves]),
        y, weight if bias is None else bias, tiles.device, len(tiles.table), width, y.stride(0),
        K=wide, R=rank, W0=w0, W1=w1, PROGRAMS=programs, BLOCK_M=height, BLOCK_N=block_n, BLOCK_K=tile.block_k,
        GROUP=tile.group, HALVES=tile.halves, BIAS=bias is not None, STAGES=tile.stages, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def can_fuse(x: Tensor, stack: LinearStack, tile: FusedTile) -> bool:
    """Whether `gemm` takes this projection: Hopper or later, 16-bit, and slices of whole blocks."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] % tile.block_k or x.stride(0) % 8:
        return False
    if stack.rank not in (16, 32, 64, 128) or any(width % tile.block_n for width in stack.widths):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
