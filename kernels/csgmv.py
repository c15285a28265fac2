"""Chunked segmented LoRA in Triton: each adapter's rows are cut into tiles, and one launch serves all adapters.

Where it pays, one product computes base and LoRA (`fused_gemm.py`, `gated_mlp.py`). Elsewhere, `expand` adds LoRA to
the base product. The kernel after `shrink` starts while `shrink` still runs (CUDA's programmatic dependent launch) and
waits before it reads h.

Letters as in `stack.py`; T rows (tokens) of the batch. After SGLang's csgmv and Punica's SGMV.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import base_gemm, fused_gemm, gated_mlp, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.expand import expand
from ranklet.kernels.launch import is_hopper, precision_of
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.row_subset import check_rows
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.shrink import shrink
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.kernels.tiles import AnyTile, ExpandTile, FusedTile, Op, ShrinkTile, TileKey, find_tile

NAME = "csgmv"
_EMBEDDING_BLOCK_N = 128


def linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    stack: LinearStack,
    batch: LoraBatch,
    rotary: Rotary | None = None,
) -> Tensor:
    """Compute a projection with LoRA, then `rotary` if given. Returns a new tensor [T, N].

    Semantics: `y[t] = rotary(gain * (W x[t] + bias + s B A x[t]) + shift)`, with A, B, s and column terms of row t's
    adapter.

    The batch must have its tiles on the device (`LoraBatch.with_tiles`). Slots must be zero beyond their adapter's
    rank, as the pool keeps them: the fused product reads whole rows of B.

    Raises:
        ValueError: `x` does not have the batch's number of rows, or the batch has segments but no tiles.
    """
    check_rows(x, batch)
    if not batch.reaches(stack):
        return base_gemm.base(x, weight, bias, rotary)
    if not batch.tiles:
        raise ValueError("batch: expected tiles for its segments, got none; call LoraBatch.with_tiles")
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    done, added = _write_fused(x, weight, bias, stack, batch, y, rotary)
    rest = rotary and rotary.rows(done)
    if added:
        _write_added(x, weight, bias, stack, batch, y, added, done, rest)
    else:
        base_gemm.base(x[done:], weight, bias, rest, out=y[done:])
    return y


def gated(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [2 N, K], gate first
    bias: Tensor | None,  # [2 N]
    stack: LinearStack,
    batch: LoraBatch,
) -> Tensor:
    """Compute the gated activation of an MLP with LoRA on gate and up. Returns a new tensor [T, N].

    Semantics: `y[t] = silu(gate[t]) * up[t]`, where `(gate[t], up[t]) = linear(x)[t]`. Requirements as of `linear`.
    """
    if bias is None and gated_mlp.can_gate(x, weight) and gated_mlp.can_add(stack, batch.tiles):
        chained = is_hopper(x.device)
        h = _shrunk(x, stack, batch.tiles[0], split=False, chained=chained)
        return gated_mlp.gated(x, weight, h, stack, batch.tiles[0], terms=batch.terms_of(stack), chained=chained)
    if base_gemm.may_widen(x) and x.shape[0] <= fused_gemm.LEAST_ROWS:  # as `linear`, but rounds only once
        product = base_gemm.widened(x, weight, bias)
        add(x, product, stack, batch)
        return pointwise.silu_mul(product, x.dtype)
    return pointwise.silu_mul(linear(x, weight, bias, stack, batch))


def add(
    x: Tensor,  # [T, K]
    y: Tensor,  # [T, N]
    stack: LinearStack,
    batch: LoraBatch,
) -> None:
    """Add the adapters' output to `y` in place, with one rounding.

    Semantics: `y[t] = gain * (y[t] + s B A x[t]) + shift`, with A, B, s and column terms of row t's adapter. The batch
    must have its tiles on the device.

    Raises:
        ValueError: the batch has segments but no tiles.
    """
    if batch.segments and not batch.tiles:
        raise ValueError("batch: expected tiles for its segments, got none; call LoraBatch.with_tiles")
    chained = is_hopper(x.device)
    for tiles in batch.tiles:
        h = _shrunk(x, stack, tiles, split=True, chained=chained)
        tile = _tile(ExpandTile, "expand", x, stack, tiles)
        expand(h, y, stack, tiles, tile, terms=batch.terms_of(stack), chained=chained)


def _write_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch, y: Tensor,
    rotary: Rotary | None,
) -> tuple[int, list[RowTiles]]:  # fmt: skip
    """Write the first rows of y, where one product of base and LoRA pays. Returns their number and the other tiles."""
    added: list[RowTiles] = []
    done, rotated = 0, False  # rows written, and whether the products rotated them
    chained = is_hopper(x.device)
    for tiles in batch.tiles:
        tile = _fused_tile(x, stack, tiles)
        rotates = bool(tile and rotary and fused_gemm.can_rotate(tile, rotary))
        if tile and not added and (done == 0 or rotates == rotated):
            h = _shrunk(x, stack, tiles, split=False, chained=chained)
            fused_gemm.gemm(
                x, weight, bias, h, y, stack, tiles, tile, rotary if rotates else None, terms=batch.terms_of(stack),
                chained=chained,
            )  # fmt: skip
            done, rotated = tiles.rows[1], rotates
        else:
            added.append(tiles)
    if rotary and done and rotated:
        rotary.rows(0, done).store(y[:done])
    elif rotary and done:
        rotary.rows(0, done).apply_(y[:done])
    return done, added


def _write_added(
    x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch, y: Tensor,
    added: list[RowTiles], done: int, rest: Rotary | None,
) -> None:  # fmt: skip
    chained = is_hopper(x.device)
    widen = base_gemm.may_widen(x[done:])
    product = (
        base_gemm.widened(x[done:], weight, bias) if widen else base_gemm.base(x[done:], weight, bias, out=y[done:])
    )
    out = y[done:] if widen and not rest and not batch.padded else None  # saves a copy of the adapters' rows
    for tiles in added:
        h = _shrunk(x, stack, tiles, split=True, chained=chained)
        tile = _tile(ExpandTile, "expand", x, stack, tiles)
        terms = batch.terms_of(stack)
        expand(h, product, stack, tiles, tile, out=out, terms=terms, first_row=done, chained=chained)
    if rest:
        rest.write(product, y[done:])
    elif out is not None and batch.lora_rows < batch.rows:
        y[batch.lora_rows :] = product[batch.lora_rows - done :]
    elif widen and out is None:
        y[done:] = product


def _fused_tile(x: Tensor, stack: LinearStack, tiles: RowTiles) -> FusedTile | None:
    tile = _tile(FusedTile, "fused", x, stack, tiles)
    return tile if tile.pays and fused_gemm.can_fuse(x, stack, tiles, tile) else None


def _shrunk(x: Tensor, stack: LinearStack, tiles: RowTiles, *, split: bool, chained: bool) -> Tensor:
    tile = _tile(ShrinkTile, "shrink", x, stack, tiles)
    if not split:
        tile = replace(tile, split=1)
    dtype = x.dtype if tile.split == 1 else torch.float32
    h = torch.empty((tile.split, x.shape[0], len(stack.widths) * stack.rank), dtype=dtype, device=x.device)
    shrink(x, h, stack, tiles, tile, chained=chained)
    return h


def _tile(kind: type[AnyTile], op: Op, x: Tensor, stack: LinearStack, tiles: RowTiles) -> AnyTile:
    key = TileKey(op, x.shape[1], stack.widths, stack.rank, tiles.height, x.shape[0], itemsize=x.element_size())
    return find_tile(x.device, kind, key)


@triton.jit(do_not_specialize_on_alignment=["tiles", "ids", "terms"])
def embedding_kernel(
    ids, a, b, y, tiles, ranks, scalings, terms, meta_stride, a_slot_stride, b_slot_stride, terms_stride, y_stride, N,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TERMS: tl.constexpr,
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
    if TERMS:
        terms_at = terms + slot.to(tl.int64) * terms_stride + columns[None, :]
        after = after * tl.load(terms_at, mask=in_columns, other=0.0)
        after += tl.load(terms_at + N, mask=in_columns, other=0.0)
    tl.store(y_at, after.to(y.dtype.element_ty), mask=mask)


def embedding(
    ids: Tensor,  # [T] integers in [0, V)
    table: Tensor,  # [V, N]
    stack: EmbeddingStack,
    batch: LoraBatch,
) -> Tensor:
    """Look up token embeddings and add LoRA in place, one row of A per token. Returns a new tensor [T, N].

    Semantics: `y[t] = gain * (table[ids[t]] + s B A[ids[t]]) + shift`, with A, B, s and column terms of row t's
    adapter, where it has LoRA.
    """
    y = functional.embedding(ids, table)
    if not stack.holds_any(segment.slot for segment in batch.segments):
        return y
    width, terms = y.shape[1], batch.terms_of(stack)
    block_n = min(_EMBEDDING_BLOCK_N, triton.next_power_of_2(width))
    for tiles in batch.tiles:
        assert tiles.on_device is not None
        embedding_kernel[(len(tiles.table), triton.cdiv(width, block_n))](
            ids, stack.a, stack.b, y, tiles.on_device[0], stack.ranks, stack.scalings,
            stack.scalings if terms is None else terms, stack.ranks.stride(0), stack.a.stride(0), stack.b.stride(0),
            0 if terms is None else terms.stride(0), y.stride(0), width, R=stack.rank, BLOCK_M=tiles.height,
            BLOCK_R=triton.next_power_of_2(stack.rank), BLOCK_N=block_n, PRECISION=precision_of(y),
            TERMS=terms is not None, num_warps=4,
        )  # fmt: skip
    return y
