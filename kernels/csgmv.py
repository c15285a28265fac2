"""Chunked segmented LoRA in Triton: each adapter's rows cut into tiles, one launch for all adapters.

Where it pays, segments get base and LoRA from one product (`gemm.py`); the others add to the base product with
`expand`. What follows `shrink` starts while it still runs (CUDA's programmatic dependent launch) and waits only before
it reads h. Letters as in `stack.py`, T rows. After SGLang's csgmv and Punica's SGMV.
"""

from dataclasses import replace
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import base_gemm, fused_gemm
from ranklet.kernels import tiles as tuned
from ranklet.kernels.batch import LoraBatch, Tiles
from ranklet.kernels.launch import is_hopper, precision_of, programs_of, slice_of, widths_of
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.row_subset import check_rows
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.kernels.tiles import ExpandTile, FusedTile, Op, ShrinkTile, TileKey

NAME = "csgmv"
T = TypeVar("T", ShrinkTile, ExpandTile, FusedTile)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _shrink_kernel(
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


def shrink(x: Tensor, h: Tensor, stack: LinearStack, tiles: Tiles, tile: ShrinkTile, *, chained: bool = False) -> None:
    """Write `s * A x` of the tiles' rows, slices side by side.

    Semantics: `h[p, t, i*R + j] = s_i * sum over part p of K of A[slot(t), i*R + j, k] x[t, k]`, parts as many as
    `tile.split`; their sum is the product.

    Args:
        x: [T, K], rows contiguous.
        h: [split, T, slices * R]; float32 if split > 1. Rows of no tile are left alone.
        chained: the next launch may start before this one ends; it must wait itself.
    """
    assert tiles.device is not None
    wide, block_k = x.shape[1], min(tile.block_k, triton.next_power_of_2(x.shape[1]))
    _shrink_kernel[(len(tiles.table), tile.split)](
        x, stack.a, h, tiles.device[0], stack.ranks, stack.scalings, stack.ranks.stride(0), wide,
        x.stride(0), stack.a.stride(0), h.stride(1), h.stride(0),
        R=stack.rank, SLICES=len(stack.widths), BLOCK_M=tiles.height, BLOCK_R=triton.next_power_of_2(stack.rank),
        BLOCK_K=block_k, SPLIT=tile.split, EVEN_K=wide % (block_k * tile.split) == 0, STAGES=tile.stages,
        PRECISION=precision_of(x), CHAINED=chained,
        num_warps=tile.warps, launch_pdl=chained, maxnreg=tile.registers or None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=["tiles"])
def _expand_kernel(
    h, b, y, out, tiles, ranks, meta_stride, h_stride, h_split_stride, b_slot_stride, y_stride, first_row,
    R: tl.constexpr, SLICES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if start >= stop:
        return
    piece, first, width, program = slice_of(tl.program_id(1), SLICES, W0, W1, W2, BLOCK_N * LOOP)
    rank = tl.load(ranks + slot * meta_stride + piece)
    if rank == 0 and not MOVED:
        return
    rows = start + tl.arange(0, BLOCK_M)
    in_rows = (rows < stop)[:, None]
    r = tl.arange(0, BLOCK_R)
    in_rank = (r < rank)[:, None]
    b_at = b + slot.to(tl.int64) * b_slot_stride + r[:, None]
    columns = program * LOOP * BLOCK_N + tl.arange(0, BLOCK_N)
    if LOOP == 1:
        fetched = tl.load(b_at + (first + columns)[None, :] * R, mask=(columns < width)[None, :] & in_rank, other=0.0)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    h_at = h + rows.to(tl.int64)[:, None] * h_stride + piece * R + r[None, :]
    in_h = in_rows & (r < rank)[None, :]
    hidden = tl.load(h_at, mask=in_h, other=0.0)
    for part in tl.static_range(1, SPLIT):
        hidden += tl.load(h_at + part * h_split_stride, mask=in_h, other=0.0)
    hidden = hidden.to(b.dtype.element_ty)
    for j in tl.range(0, LOOP, num_stages=STAGES):
        columns = (program * LOOP + j) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_columns = (columns < width)[None, :]
        if LOOP == 1:
            weight = fetched
        else:
            weight = tl.load(b_at + (first + columns)[None, :] * R, mask=in_columns & in_rank, other=0.0)
        at = (rows - first_row).to(tl.int64)[:, None] * y_stride + (first + columns)[None, :]
        before = tl.load(y + at, mask=in_rows & in_columns, other=0.0)
        after = tl.dot(hidden, weight, input_precision=PRECISION) + before.to(tl.float32)
        tl.store(out + at, after.to(out.dtype.element_ty), mask=in_rows & in_columns)


def expand(
    h: Tensor, y: Tensor, stack: LinearStack, tiles: Tiles, tile: ExpandTile, *, out: Tensor | None = None,
    first_row: int = 0, chained: bool = False,
) -> None:  # fmt: skip
    """Add the adapters' output to the base's, in float32 before one rounding.

    Semantics: `y[t, n] += sum over j of B[slot(t), n, j] h[t, slice(n)*R + j]`, in place or into `out`.

    Args:
        h: [split, T, slices * R], as `shrink` wrote it.
        y: [T - first_row, N], the batch's rows from `first_row` on; float32 rounds nothing.
        out: as y but for its dtype; every row of a tile is written.
        chained: `h` comes from a chained `shrink` right before.
    """
    assert tiles.device is not None
    moved = out is not None and out is not y
    block_n = min(tile.block_n, triton.next_power_of_2(max(stack.widths)))
    programs = programs_of(stack, block_n * tile.loop)
    _expand_kernel[(len(tiles.table), programs)](
        h, stack.b, y, out if moved else y, tiles.device[0], stack.ranks, stack.ranks.stride(0),
        h.stride(1), h.stride(0), stack.b.stride(0), y.stride(0), first_row,
        R=stack.rank, **widths_of(stack), BLOCK_M=tiles.height,
        BLOCK_R=triton.next_power_of_2(stack.rank), BLOCK_N=block_n, LOOP=tile.loop, SPLIT=h.shape[0],
        STAGES=tile.stages, PRECISION=precision_of(stack.b), CHAINED=chained, MOVED=moved,
        num_warps=tile.warps, launch_pdl=chained, maxnreg=tile.registers or None,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch, rotary: Rotary | None = None
) -> Tensor:
    """Base projection plus each segment's LoRA, then `rotary` if given; as `native.linear`.

    The batch must carry its tiles (`LoraBatch.placed`). Slots must be zero beyond their adapter's rank, as the pool
    keeps them: the product of long segments reads whole rows of B.

    Raises:
        ValueError: the batch is of other rows, or has segments but no tiles.
    """
    check_rows(x, batch)
    if not stack.holds_any(segment.slot for segment in batch.segments):
        return base_gemm.base(x, weight, bias, rotary)
    if not batch.tiles:
        raise ValueError("batch: expected tiles for its segments, got none; call LoraBatch.placed")
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    added: list[Tiles] = []
    done = turned = 0  # rows that have base and LoRA; as many if all of them were rotated on the way
    chained = is_hopper(x.device)
    for tiles in batch.tiles:
        tile = _fused(x, stack, tiles)
        turns = rotary if tile and rotary and fused_gemm.can_rotate(tile, rotary) else None
        if tile and not added and (done == 0 or bool(turns) == bool(turned)):
            h = _shrunk(x, stack, tiles, split=False, chained=chained)
            fused_gemm.gemm(x, weight, bias, h, y, stack, tiles, tile, turns, chained=chained)
            done = tiles.rows[1]
            turned = done if turns else 0
        else:
            added.append(tiles)
    if rotary and turned < done:
        rotary.of(0, done).apply_(y[:done])
    rest = rotary and rotary.of(done)
    if not added:
        base_gemm.base(x[done:], weight, bias, rest, out=y[done:])
        return y
    widen = base_gemm.may_widen(x[done:])
    below = base_gemm.widened(x[done:], weight, bias) if widen else base_gemm.base(x[done:], weight, bias, out=y[done:])
    out = y[done:] if widen and not rest and not batch.padded else None  # the adapters' rows: no pass of its own
    for tiles in added:
        h = _shrunk(x, stack, tiles, split=True, chained=chained)
        how = _tile(ExpandTile, "expand", x, stack, tiles)
        expand(h, below, stack, tiles, how, out=out, first_row=done, chained=chained)
    if rest:
        rest.write(below, y[done:])
    elif out is not None and batch.lora_rows < batch.rows:
        y[batch.lora_rows :] = below[batch.lora_rows - done :]
    elif widen and out is None:
        y[done:] = below
    return y


def _fused(x: Tensor, stack: LinearStack, tiles: Tiles) -> FusedTile | None:
    """How to make base and LoRA in one product, None where that is not possible or does not pay."""
    tile = _tile(FusedTile, "fused", x, stack, tiles)
    return tile if tile.pays and fused_gemm.can_fuse(x, stack, tiles, tile) else None


def _shrunk(x: Tensor, stack: LinearStack, tiles: Tiles, *, split: bool, chained: bool) -> Tensor:
    tile = _tile(ShrinkTile, "shrink", x, stack, tiles)
    if not split:
        tile = replace(tile, split=1)
    dtype = x.dtype if tile.split == 1 else torch.float32
    h = torch.empty((tile.split, x.shape[0], len(stack.widths) * stack.rank), dtype=dtype, device=x.device)
    shrink(x, h, stack, tiles, tile, chained=chained)
    return h


def _tile(kind: type[T], op: Op, x: Tensor, stack: LinearStack, tiles: Tiles) -> T:
    found = tuned.table(x.device.index).find(
        TileKey(op, x.shape[1], stack.widths, stack.rank, tiles.height, x.shape[0], itemsize=x.element_size())
    )
    assert isinstance(found, kind)
    return found


@triton.jit(do_not_specialize_on_alignment=["tiles", "ids"])
def _embedding_kernel(
    ids, a, b, y, tiles, ranks, scalings, meta_stride, a_slot_stride, b_slot_stride, y_stride, N,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    rank = tl.load(ranks + slot * meta_stride)
    if (start >= stop) | (rank == 0):
        return
    rows = start + tl.arange(0, BLOCK_M)
    in_rows = rows < stop
    r = tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = (columns < N)[None, :]
    token = tl.load(ids + rows, mask=in_rows, other=0).to(tl.int64)
    a_at = a + slot.to(tl.int64) * a_slot_stride + token[:, None] * R + r[None, :]
    hidden = tl.load(a_at, mask=in_rows[:, None] & (r < rank)[None, :], other=0.0)
    b_at = b + slot.to(tl.int64) * b_slot_stride + columns[None, :] * R + r[:, None]
    weight = tl.load(b_at, mask=in_columns & (r < rank)[:, None], other=0.0)
    y_at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    mask = in_rows[:, None] & in_columns
    delta = tl.dot(hidden, weight, input_precision=PRECISION) * tl.load(scalings + slot * meta_stride)
    after = tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(y_at, after.to(y.dtype.element_ty), mask=mask)


_EMBEDDING_BLOCK_N = 128


def embedding(ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: LoraBatch) -> Tensor:
    """Token embedding plus each segment's LoRA; as `native.embedding`, one row of A read per token."""
    y = functional.embedding(ids, table)
    width = y.shape[1]
    for tiles in batch.tiles:
        if len(tiles.table) == 0 or not any(stack.meta[segment.slot].ranks[0] for segment in batch.segments):
            continue
        assert tiles.device is not None
        block_n = min(_EMBEDDING_BLOCK_N, triton.next_power_of_2(width))
        _embedding_kernel[(len(tiles.table), triton.cdiv(width, block_n))](
            ids, stack.a, stack.b, y, tiles.device[0], stack.ranks, stack.scalings, stack.ranks.stride(0),
            stack.a.stride(0), stack.b.stride(0), y.stride(0), width, R=stack.rank, BLOCK_M=tiles.height,
            BLOCK_R=triton.next_power_of_2(stack.rank), BLOCK_N=block_n, PRECISION=precision_of(y), num_warps=4,
        )  # fmt: skip
    return y
