"""The base product with LoRA in its accumulator: y is written once, and rounded once.

A block of rows may belong to several adapters: after the base product each adds its own, the rows of others masked. It
pays on Hopper and later, where a pass over y costs more than a base product somewhat slower than cuBLAS's. Letters as
in `stack.py`, T rows. After Triton's persistent matmul tutorial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.batch import BLOCK_ROWS, Tiles
from ranklet.kernels.launch import is_hopper
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import FusedTile

_LORA_STAGES = 2
_LEAST_ROWS = 1024  # up to so many, cuBLAS splits K and this does not
_MOST_STEPS = 0.75  # of the base product's steps over K: with more for LoRA, a pass of its own is cheaper


@triton.jit(
    do_not_specialize=["count", "begin", "end"], do_not_specialize_on_alignment=["runs", "blocks", "begin", "end"]
)
def _gemm_kernel(
    x_tma, w_tma, b_tma, y_tma, h, y, bias, runs, blocks, count, begin, end, N, y_stride, h_stride,
    K: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, LORA_STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    columns_of_blocks = tl.cdiv(N, BLOCK_N)
    per_group = GROUP * columns_of_blocks
    for block in tl.range(tl.program_id(0), count * columns_of_blocks, PROGRAMS):
        # Blocks of a group share rows of x and columns of W, which then come from the L2 cache.
        above = block // per_group * GROUP
        height = tl.minimum(count - above, GROUP)
        row_block = above + block % per_group % height
        first = block % per_group // height * BLOCK_N
        start = begin + row_block * BLOCK_M
        piece = (first >= W0).to(tl.int32) + (first >= W0 + W1).to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            acc = tl.dot(x_tma.load([start, k]), w_tma.load([first, k]).T, acc)
        if CHAINED:
            tl.extra.cuda.gdc_wait()
        rows = start + tl.arange(0, BLOCK_M)
        h_at = h + rows.to(tl.int64)[:, None] * h_stride + piece * R + tl.arange(0, R)[None, :]
        for run in tl.range(
            tl.load(blocks + row_block * 2), tl.load(blocks + row_block * 2 + 1), num_stages=LORA_STAGES
        ):
            own = (rows >= tl.load(runs + run * 3)) & (rows < tl.load(runs + run * 3 + 1))
            hidden = tl.load(h_at, mask=own[:, None], other=0.0)
            lora_b = tl.reshape(b_tma.load([tl.load(runs + run * 3 + 2), first, 0]), (BLOCK_N, R))
            acc = tl.dot(hidden, lora_b.T, acc)
        if BIAS:
            acc += tl.load(bias + first + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
        if start + BLOCK_M <= end:
            if HALVES == 1:
                y_tma.store([start, first], acc.to(y.dtype.element_ty))
            else:
                halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                y_tma.store([start, first], left.to(y.dtype.element_ty))
                y_tma.store([start, first + BLOCK_N // 2], right.to(y.dtype.element_ty))
        else:  # the last block: the rows below are not its own
            at = y + rows.to(tl.int64)[:, None] * y_stride + (first + tl.arange(0, BLOCK_N))[None, :]
            tl.store(at, acc.to(y.dtype.element_ty), mask=(rows < end)[:, None])


def gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, y: Tensor, stack: LinearStack, tiles: Tiles,
    tile: FusedTile, *, chained: bool = False,
) -> None:  # fmt: skip
    """Write base product and adapters' output of the tiles' rows, in one accumulator with one rounding.

    Semantics: `y[t] = W x[t] + bias + B[slot(t)] h[t, slice]`.

    Args:
        x: [T, K]; weight: [N, K]; bias: [N] or None; h: [1, T, slices * R] in x's dtype.
        y: [T, N]. Rows of no tile are left alone.
        chained: `h` comes from a chained `shrink` right before.
    """
    assert tiles.device is not None
    wide, rank, block_n = x.shape[1], stack.rank, tile.block_n
    width = weight.shape[0]
    programs = _processors(x)
    w0, w1 = (*stack.widths, width)[:2]
    _, runs, blocks = tiles.device
    _gemm_kernel[(min(programs, len(tiles.blocks) * triton.cdiv(width, block_n)),)](
        TensorDescriptor.from_tensor(x, [BLOCK_ROWS, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, tile.block_k]),
        TensorDescriptor.from_tensor(stack.b, [1, block_n, rank]),
        TensorDescriptor.from_tensor(y, [BLOCK_ROWS, block_n // tile.halves]),
        h, y, weight if bias is None else bias, runs, blocks, len(tiles.blocks), *tiles.rows, width, y.stride(0),
        h.stride(1), K=wide, R=rank, W0=w0, W1=w1, PROGRAMS=programs, BLOCK_M=BLOCK_ROWS, BLOCK_N=block_n,
        BLOCK_K=tile.block_k, GROUP=tile.group, HALVES=tile.halves, BIAS=bias is not None, STAGES=tile.stages,
        LORA_STAGES=_LORA_STAGES, CHAINED=chained, num_warps=tile.warps,
        num_stages=tile.stages, launch_pdl=chained,
    )  # fmt: skip


def can_fuse(x: Tensor, stack: LinearStack, tiles: Tiles, tile: FusedTile) -> bool:
    """Whether `gemm` takes this: Hopper or later, 16 bits, slices of whole blocks, many rows, not too many adapters."""
    steps = len(tiles.runs) + len(tiles.blocks) - 1  # at most: a run adds one to each block it touches
    if len(tiles.blocks) * BLOCK_ROWS <= _LEAST_ROWS or steps * stack.rank > _MOST_STEPS * x.shape[1] * len(
        tiles.blocks
    ):
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] % tile.block_k or x.stride(0) % 8:
        return False
    if stack.rank not in (16, 32, 64, 128) or any(width % tile.block_n for width in stack.widths):
        return False
    return not x.is_cuda or is_hopper(x.device)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
