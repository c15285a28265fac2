"""Causal attention of chunks of prompts over keys and values in pages.

A program computes a tile of a span's queries for one query head. Keys are read in blocks from position 0 on, so a
token's result does not depend on how its prompt was cut into chunks.

Letters: T tokens of the batch, Q query heads, G key heads, D head width, B spans, P pages of a span. After
FlashAttention-2.
"""

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.launch import precision_of
from ranklet.kernels.paged_attention import NO_WINDOW, LayerPages, PagedSpans, attend_torch, descriptors_of, log2_scale

TILE_QUERIES = 64
_BLOCK_KEYS = 64
_WARPS = 4
_STAGES = 3


def query_tiles(counts: Sequence[int] | NDArray[np.integer], length: int | None = None) -> NDArray[np.int32]:
    """Cut the queries of spans into tiles of up to `TILE_QUERIES`: int32 [tiles, 2] of (span, first query).

    Args:
        counts: queries of each span, as in `PagedSpans`.
        length: rows of the table, at least the tiles; further rows are (-1, 0). None for exactly the tiles.
    """
    tiles = -(-np.asarray(counts, dtype=np.int64) // TILE_QUERIES)
    ends = tiles.cumsum()
    used = int(ends[-1]) if len(ends) else 0
    table = np.zeros((used if length is None else length, 2), dtype=np.int32)
    table[used:, 0] = -1
    table[:used, 0] = np.arange(len(tiles)).repeat(tiles)
    table[:used, 1] = (np.arange(used) - (ends - tiles).repeat(tiles)) * TILE_QUERIES
    return table


@triton.jit
def _add_keys(
    q, top, total, acc, first, high, position, length, window, keys_tma, values_tma, pages, head, scale,
    G: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Adds the keys [first, high) to the softmax of a tile. Without MASKED, each query sees each of these keys.
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(first, high, BLOCK_N, num_stages=STAGES):
        line = (tl.load(pages + start // PAGE) * G + head) * PAGE + start % PAGE
        scores = tl.dot(q, keys_tma.load([line, 0]).T, input_precision=PRECISION) * scale
        v = values_tma.load([line, 0])
        if MASKED:
            distance = position[:, None] - (start + n)[None, :]
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
            v = tl.where((start + n < length)[:, None], v, 0.0)  # values past the length may be NaN
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher
        if MASKED:  # a query may not see any key of the first blocks
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit(
    do_not_specialize=["window", "table_stride"],
    do_not_specialize_on_alignment=["tiles", "rows", "counts", "lengths", "table"],
)
def prefill_kernel(
    qkv, keys_tma, values_tma, out, tiles, rows, counts, lengths, table, table_stride, window, scale, qkv_stride,
    out_stride,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last tile of a chunk has the most keys, so it starts first
    span = tl.load(tiles + tile * 2)
    if span < 0:
        return
    query = tl.load(tiles + tile * 2 + 1)
    head = tl.program_id(0)
    count = tl.load(counts + span)
    length = tl.load(lengths + span)
    m = query + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (m < count)[:, None] & (d < D)[None, :]
    packed = (tl.load(rows + span) + m).to(tl.int64)[:, None]
    q = tl.load(qkv + packed * qkv_stride + head * D + d[None, :], mask=mask, other=0.0)
    begin = length - count + query  # position of the tile's first query
    position = length - count + m
    end = tl.minimum(begin + BLOCK_M, length)
    low = tl.maximum(begin + 1 - window, 0) // BLOCK_N * BLOCK_N
    # Every query sees these keys: the last query's window begins before them, and they end before the first query.
    clear = tl.minimum((tl.maximum(end - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    diagonal = tl.maximum((begin + 1) // BLOCK_N * BLOCK_N, clear)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pages = table + span * table_stride
    if WINDOWED:
        top, total, acc = _add_keys(
            q, top, total, acc, low, clear, position, length, window, keys_tma, values_tma, pages, head // GROUP, scale,
            G, PAGE, BLOCK_N, True, STAGES, PRECISION,
        )  # fmt: skip
    top, total, acc = _add_keys(
        q, top, total, acc, clear, diagonal, position, length, window, keys_tma, values_tma, pages, head // GROUP,
        scale, G, PAGE, BLOCK_N, False, STAGES, PRECISION,
    )  # fmt: skip
    top, total, acc = _add_keys(
        q, top, total, acc, diagonal, end, position, length, window, keys_tma, values_tma, pages, head // GROUP,
        scale, G, PAGE, BLOCK_N, True, 1, PRECISION,
    )  # fmt: skip
    total = tl.where(m < count, total, 1.0)  # rows past the last query may have no key
    at = out + packed * out_stride + head * D + d[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def prefill(
    qkv: Tensor,  # [T, (Q + 2 G) * D], after normalization and rotation
    spans: PagedSpans,
    pages: LayerPages,
    heads: tuple[int, int],
    window: int | None,
    out: Tensor,  # [T, Q * D]
    tiles: Tensor,  # int32 [tiles, 2] of `query_tiles`
) -> None:
    """Compute causal grouped-query attention of each span's queries. Overwrites the rows of `out` of the spans.

    The pages must already hold the keys and values of the queries. Query i of span b is packed row `rows[b] + i` and
    has the position `lengths[b] - counts[b] + i`.

    Semantics: `out[t, h] = softmax(q[t, h] k / sqrt(D)) v`, with the keys and values of the last `window` positions up
    to that of row t, and the key head `h * G // Q`.

    Args:
        heads: (Q, G).
        window: number of tokens that each token attends to, itself included; None for no limit.
    """
    if qkv.is_cuda:
        prefill_triton(qkv, spans, pages, heads, window, out, tiles)
    else:
        prefill_torch(qkv, spans, pages, heads, window, out)


def prefill_triton(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor,
    tiles: Tensor,
) -> None:  # fmt: skip
    """Compute `prefill` with Triton in one launch."""
    page, width = pages.keys.shape[2:]
    block_d = max(16, triton.next_power_of_2(width))
    prefill_kernel[(heads[0], len(tiles))](
        qkv, *descriptors_of(pages, block_d, _BLOCK_KEYS), out, tiles, spans.rows, spans.counts, spans.lengths,
        spans.table, spans.table.stride(0), NO_WINDOW if window is None else window, log2_scale(width), qkv.stride(0),
        out.stride(0), G=heads[1], GROUP=heads[0] // heads[1], D=width, BLOCK_D=block_d, PAGE=page,
        BLOCK_M=TILE_QUERIES, BLOCK_N=_BLOCK_KEYS, WINDOWED=window is not None,
        STAGES=_STAGES if qkv.element_size() == 2 else 1, PRECISION=precision_of(qkv), num_warps=_WARPS,
    )  # fmt: skip


def prefill_torch(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `prefill` with torch, one span after the other."""
    sizes = (spans.rows.tolist(), spans.counts.tolist(), spans.lengths.tolist())
    for row, count, length, table in zip(*sizes, spans.table, strict=True):
        if count:
            attend_torch(qkv, slice(row, row + count), length, table, pages, heads, window, out)
