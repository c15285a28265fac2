"""Causal attention of pieces of prompts over keys and values in pages.

A tile is some queries of a span, for the query heads that share a key head. If a span has few tiles, the keys of each
tile are cut into splits. Programs compute one split each, and a second launch combines them. The size of a split
depends only on the span's own queries and keys. Partial sums of a batch are bounded: behind that bound, a program
computes all splits of its tile and combines them in the same order, with bit-equal results. So a token's result does
not depend on the other spans of the batch. Programs find their work from the lengths in device memory, so one CUDA
graph serves all lengths.

Letters: T tokens of the batch, Q query heads, G key heads, D head width, B spans, P pages of a span. After
FlashAttention-2 and Flash-Decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import is_hopper, precision_of, processors_of
from ranklet.kernels.paged_attention import NO_WINDOW, descriptors_of, log2_scale
from ranklet.kernels.paged_spans import LayerPages, PagedSpans
from ranklet.kernels.paged_torch import attend_torch
from ranklet.kernels.prefill_splits import add_split, combine_splits_kernel, find, keys_of, pick, work_of

_ROWS = 64  # of a tile: queries times the heads that share it
_MOST_SHARING = 16
_BLOCK_KEYS = 64
_LEAST_SPLIT = 512  # keys
_SPAN_PROGRAMS = 256  # a span is cut into splits up to this many programs
_KEPT_PROGRAMS = 2048  # whose partial sums are kept; 67 MB with 128-wide heads, 8.4 MB for a span alone
_PROGRAMS = 8  # per processor
_COMBINED_ROWS = 8
_WARPS = 4
_STAGES = 3


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
        scores = tl.dot(q, keys_tma.load([line, 0]).T, input_precision=PRECISION)
        v = values_tma.load([line, 0])
        if MASKED:
            distance = position[:, None] - (start + n)[None, :]
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
            v = tl.where((start + n < length)[:, None], v, 0.0)  # values past the length may be NaN
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        base = higher
        if MASKED:  # a query may not see any key of the first blocks
            base = tl.where(higher == float("-inf"), 0.0, higher)
        # Explicit `fma`, because the compiler would use it without MASKED only: tokens would depend on cuts of prompts.
        weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def _one_split(
    q, first, high, clear, diagonal, position, length, window, keys_tma, values_tma, pages, head, scale,
    G: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Computes the softmax over the keys [first, high) of a tile. Every query sees the keys [clear, diagonal).
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    unmasked = first
    if WINDOWED:
        unmasked = tl.minimum(tl.maximum(first, clear), high)
        top, total, acc = _add_keys(
            q, top, total, acc, first, unmasked, position, length, window, keys_tma, values_tma, pages, head, scale,
            G, PAGE, BLOCK_N, True, STAGES, PRECISION,
        )  # fmt: skip
    masked = tl.minimum(tl.maximum(unmasked, diagonal), high)
    top, total, acc = _add_keys(
        q, top, total, acc, unmasked, masked, position, length, window, keys_tma, values_tma, pages, head, scale,
        G, PAGE, BLOCK_N, False, STAGES, PRECISION,
    )  # fmt: skip
    return _add_keys(
        q, top, total, acc, masked, high, position, length, window, keys_tma, values_tma, pages, head, scale,
        G, PAGE, BLOCK_N, True, 1, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["window", "spans", "table_stride"],
    do_not_specialize_on_alignment=["rows", "counts", "lengths", "table"],
)
def prefill_kernel(
    qkv, keys_tma, values_tma, out, sums, stats, rows, counts, lengths, table, spans, table_stride, window, scale,
    qkv_stride, out_stride,
    G: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, KEPT: tl.constexpr, FOLDS: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    M: tl.constexpr = BLOCK_M // SHARING
    H: tl.constexpr = G * GROUP // SHARING
    all_counts, all_lengths, all_tiles, all_sizes, all_splits, all_slots, fits = work_of(
        counts, lengths, spans, window, BLOCK_B, M, BLOCK_N, LEAST, MOST, KEPT
    )
    ends = tl.cumsum(all_tiles * tl.where(fits, all_splits, 1), 0)
    index = tl.program_id(0)
    items = tl.max(ends, 0)
    if index >= items * H:
        return
    # The last tile of a span has the most keys, so it starts first.
    span, item, own = find(items - 1 - index // H, ends, BLOCK_B)
    head = index % H * SHARING
    first_row = tl.load(rows + span)
    count = pick(all_counts, own)
    length = pick(all_lengths, own)
    size = pick(all_sizes, own)
    spread = pick(fits.to(tl.int32), own) > 0
    slot = pick(all_slots, own) + item
    splits = tl.where(spread, pick(all_splits, own), 1)
    split = item % splits
    query = item // splits * M
    begin, low, end = keys_of(query, count, length, window, M, BLOCK_N)
    used = (end - low + size - 1) // size  # splits of this tile
    stop = tl.where(spread, tl.minimum(split + 1, used), used)
    # Every query sees these keys: the last query's window begins before them, and they end before the first query.
    clear = tl.minimum((tl.maximum(end - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    diagonal = tl.maximum((begin + 1) // BLOCK_N * BLOCK_N, clear)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    heads = head + m % SHARING
    row = query + m // SHARING
    position = begin + m // SHARING
    mask = (row < count)[:, None] & (d < D)[None, :]
    packed = (first_row + row).to(tl.int64)[:, None]
    q = tl.load(qkv + packed * qkv_stride + heads[:, None] * D + d[None, :], mask=mask, other=0.0)
    pages = table + span * table_stride
    first = low + split * size
    top, total, acc = _one_split(
        q, first, tl.minimum(first + size, end), clear, diagonal, position, length, window, keys_tma, values_tma,
        pages, head // GROUP, scale, G, PAGE, BLOCK_M, BLOCK_D, BLOCK_N, WINDOWED, STAGES, PRECISION,
    )  # fmt: skip
    if FOLDS:
        for part in tl.range(split + 1, stop, num_stages=1):
            first = low + part * size
            next_top, next_total, next_acc = _one_split(
                q, first, tl.minimum(first + size, end), clear, diagonal, position, length, window, keys_tma,
                values_tma, pages, head // GROUP, scale, G, PAGE, BLOCK_M, BLOCK_D, BLOCK_N, WINDOWED, STAGES,
                PRECISION,
            )  # fmt: skip
            top, total, acc = add_split(top, total, acc, next_top, next_total, next_acc)
    # Loaded again, because fewer registers are then in use above.
    row = query + m // SHARING
    mask = (row < tl.load(counts + span))[:, None] & (d < D)[None, :]
    if (used == 1) | (spread == 0):
        if split < stop:
            total = tl.where(row < count, total, 1.0)  # rows past the last query may have no key
            packed = (tl.load(rows + span) + row).to(tl.int64)[:, None]
            at_out = out + packed * out_stride + heads[:, None] * D + d[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    elif split < stop:
        line = (slot * H + head // SHARING).to(tl.int64) * BLOCK_M + m
        tl.store(sums + line[:, None] * D + d[None, :], acc, mask=mask)
        tl.store(stats + line * 2, top)
        tl.store(stats + line * 2 + 1, total)


def prefill(
    qkv: Tensor,  # [T, (Q + 2 G) * D], after normalization and rotation
    spans: PagedSpans,
    pages: LayerPages,
    heads: tuple[int, int],
    window: int | None,
    out: Tensor,  # [T, Q * D]
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
        prefill_triton(qkv, spans, pages, heads, window, out)
    else:
        prefill_torch(qkv, spans, pages, heads, window, out)


def prefill_triton(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `prefill` with Triton: one launch, or two if a span of the table's width may have several splits."""
    (queries, key_heads), (page, width) = heads, pages.keys.shape[2:]
    batch, held = spans.table.shape
    group = queries // key_heads
    sharing = min(group & -group, _MOST_SHARING)  # a power of two
    groups, per_tile = queries // sharing, _ROWS // sharing
    reach = NO_WINDOW if window is None else window
    most = max(1, _SPAN_PROGRAMS // groups)
    splits = most > 1 and min(held * page, reach + per_tile + _BLOCK_KEYS) > _LEAST_SPLIT
    most_kept = _KEPT_PROGRAMS // groups
    kept = min(most_kept, batch * most) if splits else 0
    lines = max(1, kept * groups * _ROWS)
    sums = torch.empty((lines, width), dtype=torch.float32, device=qkv.device)
    stats = torch.empty((lines, 2), dtype=torch.float32, device=qkv.device)
    chained = is_hopper(qkv.device)
    shared = {
        "SHARING": sharing, "D": width, "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_B": max(16, triton.next_power_of_2(batch)), "BLOCK_M": _ROWS, "BLOCK_N": _BLOCK_KEYS,
        "LEAST": _LEAST_SPLIT, "MOST": most, "KEPT": most_kept, "CHAINED": chained, "launch_pdl": chained,
    }  # fmt: skip
    most_programs = _PROGRAMS * processors_of(qkv.device)
    tiles = triton.cdiv(len(qkv), per_tile) + batch
    prefill_kernel[((tiles + kept) * groups,)](
        qkv, *descriptors_of(pages, shared["BLOCK_D"], _BLOCK_KEYS), out, sums, stats, spans.rows, spans.counts,
        spans.lengths, spans.table, batch, spans.table.stride(0), reach, log2_scale(width), qkv.stride(0),
        out.stride(0), G=key_heads, GROUP=group, PAGE=page, FOLDS=splits and batch * most > most_kept,
        WINDOWED=window is not None, STAGES=_STAGES if qkv.element_size() == 2 else 1, PRECISION=precision_of(qkv),
        num_warps=_WARPS, **shared,
    )  # fmt: skip
    if splits:
        combined = kept // 2 * groups * (_ROWS // _COMBINED_ROWS)
        combine_splits_kernel[(max(1, min(most_programs, combined)),)](
            sums, stats, out, spans.rows, spans.counts, spans.lengths, batch, reach, out.stride(0), Q=queries,
            BLOCK_R=_COMBINED_ROWS, num_warps=4, **shared,
        )  # fmt: skip


def prefill_torch(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `prefill` with torch, one span after the other."""
    sizes = (spans.rows.tolist(), spans.counts.tolist(), spans.lengths.tolist())
    for row, count, length, table in zip(*sizes, spans.table, strict=True):
        if count:
            attend_torch(qkv, slice(row, row + count), length, table, pages, heads, window, out)
