"""The base product with LoRA in its accumulator: y is written once and rounded once.

A block of rows may belong to several adapters. After the base product, the part of each adapter is added with the rows
of the others masked. That pays on Hopper and later: the product is slightly slower than cuBLAS's, but a pass over y is
saved. For the same reason, queries and keys can be normalized and rotated here, with LoRA or without.

Letters as in `stack.py`; T rows (tokens) of the batch. After Triton's persistent matmul tutorial.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.launch import is_hopper, launch_fitted, processors_of
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.row_tiles import BLOCK_ROWS, RowTiles
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import FusedTile, TileKey, find_tile

_LORA_STAGES = 2
LEAST_ROWS = 1024  # with fewer, cuBLAS is faster: it splits K and this kernel does not
_MOST_STEPS = 0.75  # LoRA's steps relative to the base product's: with more, a separate pass is cheaper


@triton.jit
def _store_head(
    head, y_tma, y, first, start, end, rows, y_stride, weight, c, s, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Normalizes and rotates a query or key head [BLOCK_M, 2 * HALF] and stores it in y's columns from `first` on.
    low, high = tl.split(tl.permute(tl.reshape(head, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    columns = tl.arange(0, HALF)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low = low * scale * tl.load(weight + columns).to(tl.float32)[None, :]
        high = high * scale * tl.load(weight + HALF + columns).to(tl.float32)[None, :]
    rotated_low = (low * c - high * s).to(y.dtype.element_ty)
    rotated_high = (high * c + low * s).to(y.dtype.element_ty)
    if start + BLOCK_M <= end:
        y_tma.store([start, first], rotated_low)
        y_tma.store([start, first + HALF], rotated_high)
    else:
        at = y + rows.to(tl.int64)[:, None] * y_stride + (first + columns)[None, :]
        tl.store(at, rotated_low, mask=(rows < end)[:, None])
        tl.store(at + HALF, rotated_high, mask=(rows < end)[:, None])


@triton.jit(
    do_not_specialize=["count", "begin", "end"],
    do_not_specialize_on_alignment=["runs", "blocks", "begin", "end", "positions", "terms"],
)
def gemm_kernel(
    x_tma, w_tma, b_tma, y_tma, y_half_tma, h, y, bias, runs, blocks, terms, count, begin, end, N, y_stride, h_stride,
    terms_stride, q_weight, k_weight, cos, sin, positions, eps,
    K: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    BIAS: tl.constexpr, LORA: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr,
    LORA_STAGES: tl.constexpr, CHAINED: tl.constexpr, TERMS: tl.constexpr,
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
        rows = start + tl.arange(0, BLOCK_M)
        if CHAINED:
            tl.extra.cuda.gdc_wait()
        if LORA:
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
        if TERMS:
            for run in tl.range(tl.load(blocks + row_block * 2), tl.load(blocks + row_block * 2 + 1), num_stages=1):
                own = (rows >= tl.load(runs + run * 3)) & (rows < tl.load(runs + run * 3 + 1))
                terms_at = terms + tl.load(runs + run * 3 + 2).to(tl.int64) * terms_stride
                gain = tl.load(terms_at + first + tl.arange(0, BLOCK_N))[None, :]
                shift = tl.load(terms_at + N + first + tl.arange(0, BLOCK_N))[None, :]
                acc = tl.where(own[:, None], acc * gain + shift, acc)
        if HALF > 0 and piece < 2:
            angles = tl.load(positions + rows, mask=rows < end, other=0).to(tl.int64)[:, None] * HALF
            c = tl.load(cos + angles + tl.arange(0, HALF)[None, :])
            s = tl.load(sin + angles + tl.arange(0, HALF)[None, :])
            weight = q_weight
            if piece == 1:
                weight = k_weight
            if BLOCK_N == 2 * HALF:
                _store_head(
                    acc, y_half_tma, y, first, start, end, rows, y_stride, weight, c, s, eps, HALF, NORM, BLOCK_M
                )
            else:
                left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, 2 * HALF)), (0, 2, 1)))
                _store_head(
                    left, y_half_tma, y, first, start, end, rows, y_stride, weight, c, s, eps, HALF, NORM, BLOCK_M
                )
                _store_head(
                    right, y_half_tma, y, first + 2 * HALF, start, end, rows, y_stride, weight, c, s, eps, HALF, NORM,
                    BLOCK_M,
                )  # fmt: skip
        elif start + BLOCK_M <= end:
            if HALVES == 1:
                y_tma.store([start, first], acc.to(y.dtype.element_ty))
            else:
                halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                y_tma.store([start, first], left.to(y.dtype.element_ty))
                y_tma.store([start, first + BLOCK_N // 2], right.to(y.dtype.element_ty))
        else:  # the last block: the rows after `end` are not its own
            at = y + rows.to(tl.int64)[:, None] * y_stride + (first + tl.arange(0, BLOCK_N))[None, :]
            tl.store(at, acc.to(y.dtype.element_ty), mask=(rows < end)[:, None])


def gemm(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    h: Tensor,  # [1, T, slices * R] in the dtype of `x`, as `shrink` wrote it
    y: Tensor,  # [T, N]
    stack: LinearStack,
    tiles: RowTiles,
    tile: FusedTile,
    rotary: Rotary | None = None,
    *,
    terms: Tensor | None = None,  # float32 [S, 2, N]
    chained: bool = False,
) -> None:
    """Compute base product and LoRA of the tiles' rows in one accumulator. Overwrites these rows of `y`.

    Semantics: `y[t] = rotary(gain[slot(t)] * (W x[t] + bias + B[slot(t)] h[t]) + shift[slot(t)])`, rounded once.
    Requires `can_fuse`.

    Args:
        rotary: for packed queries, keys and values; requires `can_rotate`. The caller stores keys and values
            (`Rotary.store`).
        chained: whether the launch right before this one is a `shrink` with `chained` that writes `h`.
    """
    assert tiles.on_device is not None
    b_tma = TensorDescriptor.from_tensor(stack.b, [1, tile.block_n, stack.rank])
    lora = _Lora(b_tma, h, *tiles.on_device[1:], stack.rank, terms)
    widths = (*stack.widths, weight.shape[0])[:2]
    _launch(x, weight, bias, y, tile, (len(tiles.blocks), *tiles.rows), widths, rotary, lora, chained=chained)


def rotated(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    y: Tensor,  # [T, N]
    rotary: Rotary,
) -> None:
    """Compute packed queries, keys and values without LoRA. Overwrites `y`.

    Semantics: `y[t] = rotary(W x[t] + bias)`, rounded once. Requires `can_rotate_base`. The caller stores keys and
    values (`Rotary.store`).
    """
    rows = x.shape[0]
    blocks = triton.cdiv(rows, BLOCK_ROWS)
    _launch(x, weight, bias, y, _rotated_tile(x, rotary), (blocks, 0, rows), rotary.widths, rotary, None)


class _Lora(NamedTuple):
    b_tma: Any
    h: Tensor
    runs: Tensor
    blocks: Tensor
    rank: int
    terms: Tensor | None = None


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, tile: FusedTile, blocks_and_rows: tuple[int, int, int],
    widths: Sequence[int], rotary: Rotary | None, lora: _Lora | None, *, chained: bool = False,
) -> None:  # fmt: skip
    # Absent tensors are replaced by any other tensor, which the kernel does not read.
    block_n, programs = tile.block_n, processors_of(x.device)
    w_tma = TensorDescriptor.from_tensor(weight, [block_n, tile.block_k])
    y_tma = TensorDescriptor.from_tensor(y, [BLOCK_ROWS, block_n // tile.halves])
    b_tma, h, runs, blocks, rank, terms = lora or _Lora(w_tma, x, x, x, 0)
    half, y_half_tma, rotation = 0, y_tma, (x, x, x, x, x, 0.0)
    if rotary is not None:
        half, y_half_tma = rotary.half, TensorDescriptor.from_tensor(y, [BLOCK_ROWS, rotary.half])
        rotation = (*(rotary.norms or (x, x)), rotary.cos, rotary.sin, rotary.positions, rotary.eps)
    grid = (min(programs, blocks_and_rows[0] * triton.cdiv(weight.shape[0], block_n)),)
    x_tma = TensorDescriptor.from_tensor(x, [BLOCK_ROWS, tile.block_k])
    norm = rotary is not None and rotary.norms is not None

    def launch(stages: int) -> None:
        gemm_kernel[grid](
            x_tma, w_tma, b_tma, y_tma, y_half_tma, h, y, weight if bias is None else bias, runs, blocks,
            x if terms is None else terms, *blocks_and_rows, weight.shape[0], y.stride(0), h.stride(-2),
            0 if terms is None else terms.stride(0), *rotation, K=x.shape[1], R=rank,
            W0=widths[0], W1=widths[1], PROGRAMS=programs, BLOCK_M=BLOCK_ROWS, BLOCK_N=block_n, BLOCK_K=tile.block_k,
            GROUP=tile.group, HALVES=tile.halves, BIAS=bias is not None, LORA=lora is not None, HALF=half, NORM=norm,
            STAGES=stages, LORA_STAGES=_LORA_STAGES, CHAINED=chained, TERMS=terms is not None,
            num_warps=tile.warps, num_stages=stages, launch_pdl=chained,
        )  # fmt: skip

    launch_fitted(launch, tile.stages, (gemm_kernel, tile, rank, bias is None, half, norm, chained, terms is not None))


def can_fuse(x: Tensor, stack: LinearStack, tiles: RowTiles, tile: FusedTile) -> bool:
    """Return whether `gemm` supports these tensors and saves time.

    It needs Hopper or later, 16 bits, many rows, slices of whole blocks, and few adapters per block.
    """
    if runs_per_block(tiles) * stack.rank > _MOST_STEPS * x.shape[1] or stack.rank not in (16, 32, 64, 128):
        return False
    if x.is_cuda and not is_hopper(x.device):
        return False
    return suits(x, len(tiles.blocks) * BLOCK_ROWS, tile) and not any(width % tile.block_n for width in stack.widths)


def runs_per_block(tiles: RowTiles) -> float:
    """Return an upper bound on the mean number of adapters in a block of rows."""
    return 1 + (len(tiles.runs) - 1) / len(tiles.blocks)  # a block has a step for each run that it intersects


def can_rotate(tile: FusedTile, rotary: Rotary) -> bool:
    """Return whether a block of this tile holds one or two whole heads of 64 or 128 columns."""
    if rotary.half not in (32, 64) or tile.block_n not in (2 * rotary.half, 4 * rotary.half):
        return False
    return not any(width % tile.block_n for width in rotary.widths)


def can_rotate_base(x: Tensor, weight: Tensor, rotary: Rotary) -> bool:
    """Return whether `rotated` supports these tensors: Hopper or later, 16 bits, many rows, blocks of whole heads."""
    if not is_hopper(x.device):
        return False
    tile = _rotated_tile(x, rotary)
    return suits(x, x.shape[0], tile) and weight.shape[0] % tile.block_n == 0 and can_rotate(tile, rotary)


def suits(x: Tensor, rows: int, tile: FusedTile) -> bool:
    """Return whether a persistent product supports `x`: 16 bits, many rows, aligned for TMA, whole steps over K."""
    return (
        rows > LEAST_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % tile.block_k == 0
        and x.stride(0) % 8 == 0
    )


def _rotated_tile(x: Tensor, rotary: Rotary) -> FusedTile:
    return find_tile(x.device, FusedTile, TileKey("rotated", x.shape[1], rotary.widths, 0, BLOCK_ROWS, x.shape[0]))
