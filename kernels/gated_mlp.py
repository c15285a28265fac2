"""The MLP's first product and its activation in one kernel, which writes only `silu(gate) * up`.

The product is slower than cuBLAS's, but saves more time: gate and up are never written to memory. With LoRA, that also
saves the time of adding it to them.

Letters as in `stack.py`, except N: width of gate and of up. T rows (tokens). After Triton's persistent matmul tutorial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.fused_gemm import runs_per_block, suits
from ranklet.kernels.launch import is_hopper, launch_fitted, processors_of
from ranklet.kernels.row_tiles import BLOCK_ROWS, RowTiles
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import FusedTile, TileKey, find_tile

_RANKS = (16, 32)  # with more, B does not fit into the registers next to the accumulator
_MOST_RUNS = 2.0  # adapters in a block of rows; each one after the first waits for its loads


@triton.jit
def _place(block, row_blocks, columns_of_blocks: tl.constexpr, GROUP: tl.constexpr):
    # Blocks of a group share rows of x and columns of W, which then come from the L2 cache.
    above = block // (GROUP * columns_of_blocks) * GROUP
    height = tl.maximum(tl.minimum(row_blocks - above, GROUP), 1)
    place = block % (GROUP * columns_of_blocks)
    return above + place % height, place // height


@triton.jit
def _first_run(runs, run, last):
    used = run < last
    low = tl.load(runs + run * 3, mask=used, other=0)
    high = tl.load(runs + run * 3 + 1, mask=used, other=0)
    slot = tl.load(runs + run * 3 + 2, mask=used, other=0)
    return low, high, slot


@triton.jit(do_not_specialize=["rows", "lora_blocks"], do_not_specialize_on_alignment=["runs", "blocks", "terms"])
def gated_kernel(
    x_tma, w_tma, y_tma, h, b, runs, blocks, terms, rows, lora_blocks, h_stride, b_slot_stride, terms_stride,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_M)
    columns_of_blocks: tl.constexpr = N // BLOCK_N
    total = row_blocks * columns_of_blocks
    run, last, low, high, slot = 0, 0, 0, 0, 0
    if R > 0:
        # One product adds LoRA to gate and up: [hg | hu] times a matrix with Bg and Bu on its diagonal.
        r = tl.arange(0, 2 * R)
        n = tl.arange(0, 2 * BLOCK_N)
        half = n // BLOCK_N
        is_own = half[:, None] == (r // R)[None, :]
        row_block, _ = _place(tl.program_id(0), row_blocks, columns_of_blocks, GROUP)
        run = tl.load(blocks + row_block * 2, mask=row_block < lora_blocks, other=0)
        last = tl.load(blocks + row_block * 2 + 1, mask=row_block < lora_blocks, other=0)
        low, high, slot = _first_run(runs, run, last)
    for block in tl.range(tl.program_id(0), total, PROGRAMS):
        row_block, column = _place(block, row_blocks, columns_of_blocks, GROUP)
        start, first = row_block * BLOCK_M, column * BLOCK_N
        next_run, next_last = 0, 0
        if R > 0:
            # Loads whose results are needed after the K loop hide their latency. So the place of the next block's first
            # adapter is loaded one block earlier.
            later, _ = _place(block + PROGRAMS, row_blocks, columns_of_blocks, GROUP)
            exists = (block + PROGRAMS < total) & (later < lora_blocks)
            next_run = tl.load(blocks + later * 2, mask=exists, other=0)
            next_last = tl.load(blocks + later * 2 + 1, mask=exists, other=0)
            row = start + tl.arange(0, BLOCK_M)
            in_run = ((row >= low) & (row < high))[:, None]
            h_at = h + row.to(tl.int64)[:, None] * h_stride + r[None, :]
            b_at = b + (half * N + first + n % BLOCK_N)[:, None] * R + (r % R)[None, :]
            lora_b = tl.load(b_at + tl.cast(slot, tl.int64) * b_slot_stride, mask=is_own, other=0.0)
            if CHAINED:
                tl.extra.cuda.gdc_wait()
            hidden = tl.load(h_at, mask=in_run, other=0.0)
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            weight = tl.reshape(w_tma.load([0, first, k]), (2 * BLOCK_N, BLOCK_K))
            acc = tl.dot(x_tma.load([start, k]), weight.T, acc)
        if R > 0:
            used = run < last  # selecting here keeps Triton from waiting for the loads before the loop
            acc = tl.dot(tl.where(used, hidden, 0.0), tl.where(used, lora_b, 0.0).T, acc)
            for own in tl.range(run + 1, last, num_stages=1):
                in_run = ((row >= tl.load(runs + own * 3)) & (row < tl.load(runs + own * 3 + 1)))[:, None]
                other = tl.load(runs + own * 3 + 2).to(tl.int64)
                other_b = tl.load(b_at + other * b_slot_stride, mask=is_own, other=0.0)
                acc = tl.dot(tl.load(h_at, mask=in_run, other=0.0), other_b.T, acc)
            if TERMS:
                for own in tl.range(run, last, num_stages=1):
                    in_run = ((row >= tl.load(runs + own * 3)) & (row < tl.load(runs + own * 3 + 1)))[:, None]
                    terms_at = terms + tl.load(runs + own * 3 + 2).to(tl.int64) * terms_stride
                    terms_at += half * N + first + n % BLOCK_N
                    gain, shift = tl.load(terms_at)[None, :], tl.load(terms_at + 2 * N)[None, :]
                    acc = tl.where(in_run, acc * gain + shift, acc)
            low, high, slot = _first_run(runs, next_run, next_last)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        run, last = next_run, next_last
        y_tma.store([start, first], (gate * tl.sigmoid(gate) * up).to(y_tma.dtype))


def gated(
    x: Tensor,  # [T, K], 16 bits
    weight: Tensor,  # [2 N, K], gate first
    h: Tensor | None = None,  # [1, T, 2 R] in the dtype of `x`, as `shrink` wrote it; None without LoRA
    stack: LinearStack | None = None,
    tiles: RowTiles | None = None,
    *,
    terms: Tensor | None = None,  # float32 [S, 2, 2 N]
    chained: bool = False,
) -> Tensor:
    """Compute the gated activation of an MLP. Returns a new tensor [T, N].

    Semantics: `y[t] = silu(Wg x[t] + Bg hg[t]) * (Wu x[t] + Bu hu[t])`, rounded once, with B of row t's adapter.
    With `terms`, gate and up are `gain * (...) + shift` before the activation. Requires `can_gate`, and with LoRA,
    `can_add`.

    Args:
        chained: whether the launch right before this one is a `shrink` with `chained` that writes `h`.
    """
    rows, wide = x.shape
    width, tile, programs = weight.shape[0] // 2, _tile(x, weight), processors_of(x.device)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    pair = weight.view(2, width, wide)
    x_tma = TensorDescriptor.from_tensor(x, [BLOCK_ROWS, tile.block_k])
    w_tma = TensorDescriptor.from_tensor(pair, [2, tile.block_n, tile.block_k])
    y_tma = TensorDescriptor.from_tensor(y, [BLOCK_ROWS, tile.block_n])
    rank, lora = 0, (x, x, x, x, x, rows, 0, 0, 0, 0)  # without LoRA, the kernel reads none of these tensors
    if h is not None and stack is not None and tiles is not None and tiles.on_device is not None:
        rank, (_, runs, blocks) = stack.rank, tiles.on_device
        lora = (
            h, stack.b, runs, blocks, x if terms is None else terms, rows, len(tiles.blocks), h.stride(1),
            stack.b.stride(0), 0 if terms is None else terms.stride(0),
        )  # fmt: skip

    def launch(stages: int) -> None:
        gated_kernel[(min(programs, triton.cdiv(rows, BLOCK_ROWS) * (width // tile.block_n)),)](
            x_tma, w_tma, y_tma, *lora, N=width, K=wide, R=rank, PROGRAMS=programs, BLOCK_M=BLOCK_ROWS,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group, STAGES=stages, CHAINED=chained,
            TERMS=terms is not None, num_warps=tile.warps, num_stages=stages, launch_pdl=chained,
        )  # fmt: skip

    launch_fitted(launch, tile.stages, (gated_kernel, tile, rank, chained, terms is not None))
    return y


def can_gate(x: Tensor, weight: Tensor) -> bool:
    """Return whether `gated` supports these tensors: Hopper or later, 16 bits, many rows, and whole blocks."""
    if not is_hopper(x.device):
        return False
    tile = _tile(x, weight)
    return suits(x, x.shape[0], tile) and weight.shape[0] // 2 % tile.block_n == 0 and weight.is_contiguous()


def can_add(stack: LinearStack, tiles: tuple[RowTiles, ...]) -> bool:
    """Return whether `gated` can add LoRA: low rank, tiles of one height, and few adapters in a block of rows."""
    return len(tiles) == 1 and stack.rank in _RANKS and runs_per_block(tiles[0]) <= _MOST_RUNS


def _tile(x: Tensor, weight: Tensor) -> FusedTile:
    return find_tile(x.device, FusedTile, TileKey("gated", x.shape[1], (weight.shape[0],), 0, BLOCK_ROWS, x.shape[0]))
