"""Attention of one new token per sequence over keys and values in pages, as a decode step needs it.

A program computes a part of a sequence's keys, a split, for one key head. The program that finishes a sequence's last
split combines them, in their order. The size of a split depends on the sequence's length and on whether the batch has
one sequence, few or many (`_SPLITS`). Programs compute their splits from the lengths in device memory, so one CUDA
graph serves all lengths.

Sequences that begin with the same pages form groups (`prefix_groups.py`). The keys that a group shares are split apart
from the rest, and a program computes such a split for all sequences of the group.

Letters: T tokens of the batch, Q query heads, G key heads, D head width, B spans, P pages of a span. After
Flash-Decoding and, for groups, Hydragen.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.launch import is_hopper, precision_of, processors_of
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans
from ranklet.kernels.paged_torch import decode_torch

NO_WINDOW = 1 << 30
# Rows: a number of spans up to which the row counts, the most splits of a span, and the fewest tokens of a split. An
# H200 runs 528 programs at once, and a model has about 8 key heads. Longer spans have more splits of the largest size.
_SPLITS = ((1, 32, 64), (4, 16, 128), (16, 4, 128))
_WHOLE = (1, PAGE_TOKENS)  # for more spans, which fill the GPU unsplit
_SHARED_SPLITS = ((4, 16, 128), (16, 16, 256))  # the same for keys that a group shares
_SHARED_OTHERWISE = (8, 512)
_LARGEST_SPLIT = 2048  # tokens
_MOST_SPLITS = 32  # of a span; with more tokens, its splits are larger
_SIDE = 8  # splits of a span that are combined side by side; those of a group, which has more rows, one by one
_ROWS = 16  # query heads that a program computes: those of one span, or of all spans of a group
_BLOCK_KEYS = 64
_PROGRAMS = 12  # per processor, which holds 4: later programs even out sequences of different lengths
_WARPS = 2  # fewer warps let more programs share a processor, which hides the start of each
_STAGES = 3


def group_limit(heads: tuple[int, int]) -> int:
    """Return the most spans of a group, for (Q, G) heads."""
    return max(1, _ROWS * heads[1] // heads[0])


@triton.jit
def _splits(first, length, window, most, least, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr, CAP: tl.constexpr):
    # Returns the first key that is read, from `first` on, the tokens of a split, and the number of splits.
    begin = tl.maximum(tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N, first)
    keys = length - begin
    count = tl.minimum((keys + least - 1) // least, most)
    count = tl.minimum(tl.maximum(count, (keys + LARGEST - 1) // LARGEST), CAP)
    size = tl.maximum((keys + count * BLOCK_N - 1) // tl.maximum(count * BLOCK_N, 1), 1) * BLOCK_N
    return begin, size, (keys + size - 1) // size


@triton.jit
def _split_count(first, length, window, most, least, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr, CAP: tl.constexpr):
    _begin, _size, count = _splits(first, length, window, most, least, BLOCK_N, LARGEST, CAP)
    return count


@triton.jit
def _shared_splits(shared, MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    # Returns the tokens of a split of the keys that a group shares, and the number of splits.
    size = tl.maximum((shared + MOST * BLOCK_N - 1) // (MOST * BLOCK_N) * BLOCK_N, LEAST)
    return size, (shared + size - 1) // size


@triton.jit
def _add_block(q, k, v, seen, top, total, acc, scale, PRECISION: tl.constexpr):
    # Adds a block of keys, of which at least one is seen, to the softmax.
    scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, 1), acc


@triton.jit
def _combine(
    out, sums, stats, row, span, counts, heads, is_row, kept, out_stride, d,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    # Writes the outputs of query heads of one key head, which it combines from SIDE splits at a time.
    split = tl.arange(0, SIDE)
    counts = tl.where(is_row, counts, 0)
    top = tl.full((BLOCK_ROWS,), -1e38, tl.float32)  # finite, so that rows past the group give no NaN
    total = 1.0 - is_row.to(tl.float32)
    mixed = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in tl.range(0, tl.max(counts, 0), SIDE, num_stages=1):
        live = (first + split)[:, None] < counts[None, :]
        index = (span.to(tl.int64) * kept)[None, :] + (first + split)[:, None]
        index = index * (G * GROUP) + heads[None, :]
        tops = tl.load(stats + index * 2, mask=live, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + index * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        mask = live[:, :, None] & (d < D)[None, None, :]
        parts = tl.load(sums + index[:, :, None] * D + d[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, 0))
        fades = tl.exp2(tops - higher[None, :])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(totals * fades, 0)
        mixed = mixed * fade[:, None] + tl.sum(parts * fades[:, :, None], 0)
        top = higher
    at = out + row[:, None] * out_stride + heads[:, None] * D + d[None, :]
    tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])


@triton.jit(
    do_not_specialize=["window", "spans", "table_stride", "most", "least", "kept"],
    do_not_specialize_on_alignment=["rows", "lengths", "table", "shared", "firsts", "members"],
)
def split_kernel(
    qkv, keys_tma, values_tma, keys, values, out, sums, stats, arrivals, rows, lengths, table, shared, firsts, members,
    spans, table_stride, window, most, least, kept, scale, qkv_stride, out_stride,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_B: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr,
    CAP: tl.constexpr, SIDE: tl.constexpr, MOST_SHARED: tl.constexpr, LEAST_SHARED: tl.constexpr, SHARES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    every = tl.arange(0, BLOCK_B)
    all_lengths = tl.load(lengths + every, mask=every < spans, other=0)
    begins = tl.zeros((BLOCK_B,), tl.int32)
    if SHARES:
        begins = tl.load(shared + every, mask=every < spans, other=0)
    counts = _split_count(begins, all_lengths, window, most, least, BLOCK_N, LARGEST, CAP)
    if SHARES:  # the splits of the shared keys come behind those of the group's first span
        leads = tl.load(firsts + every, mask=every < spans, other=-1) == every
        _size, in_prefix = _shared_splits(begins, MOST_SHARED, LEAST_SHARED, BLOCK_N)
        counts += tl.where(leads, in_prefix, 0)
    ends = tl.cumsum(counts, 0)
    r = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    for item in tl.range(tl.program_id(0), tl.sum(counts, 0) * G, tl.num_programs(0), num_stages=1):
        # Consecutive items are the key heads of one split.
        head = item % G
        before = ends <= item // G
        span = tl.sum(before.to(tl.int32), 0)
        split = item // G - tl.max(tl.where(before, ends, 0), 0)
        length = tl.load(lengths + span)
        common = 0
        first_span = span
        group_spans = 1
        if SHARES:
            common = tl.load(shared + span)
            first_span = tl.load(firsts + span)
            group_spans = tl.load(members + span)
        begin, size, count = _splits(common, length, window, most, least, BLOCK_N, LARGEST, CAP)
        low = begin + split * size
        high = tl.minimum(low + size, length)
        own_members = 1  # whose queries this item computes
        if SHARES:
            shared_size, shared_count = _shared_splits(common, MOST_SHARED, LEAST_SHARED, BLOCK_N)
            if split >= count:
                low = (split - count) * shared_size
                high = tl.minimum(low + shared_size, common)
                own_members = group_spans
                split -= count
            else:
                split += shared_count
            count += shared_count
        # Row r is query head r % GROUP of the span's key head, for member r // GROUP.
        live = r < own_members * GROUP
        own_span = span + r // GROUP
        heads = head * GROUP + r % GROUP
        span_row = tl.load(rows + span).to(tl.int64)
        row = tl.zeros((BLOCK_G,), tl.int64) + span_row
        if SHARES:
            row = tl.load(rows + own_span, mask=live, other=0).to(tl.int64)
        in_rows = live[:, None] & (d < D)[None, :]
        q = tl.load(qkv + row[:, None] * qkv_stride + heads[:, None] * D + d[None, :], mask=in_rows, other=0.0)
        top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        last = high // BLOCK_N * BLOCK_N
        for first in tl.range(low, last, BLOCK_N, num_stages=STAGES):
            page = tl.load(table + span * table_stride + first // PAGE)
            line = (page * G + head) * PAGE + first % PAGE
            seen = first + n >= length - window
            top, total, acc = _add_block(
                q, keys_tma.load([line, 0]), values_tma.load([line, 0]), seen, top, total, acc, scale, PRECISION
            )
        if last < high:  # the last page may hold NaN past the length, so a mask replaces the descriptors
            page = tl.load(table + span * table_stride + last // PAGE).to(tl.int64)
            at = ((page * G + head) * PAGE + last % PAGE + n)[:, None] * D + d[None, :]
            held = last + n < length
            mask = held[:, None] & (d < D)[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
            seen = held & (last + n >= length - window)
            top, total, acc = _add_block(q, k, v, seen, top, total, acc, scale, PRECISION)
        if count == 1:
            at_out = out + row[:, None] * out_stride + heads[:, None] * D + d[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=in_rows)
        else:
            index = (own_span.to(tl.int64) * kept + split) * (G * GROUP) + heads
            tl.store(sums + index[:, None] * D + d[None, :], acc, mask=in_rows)
            tl.store(stats + index * 2, top, mask=live)
            tl.store(stats + index * 2 + 1, total, mask=live)
            expected = count
            if SHARES:  # the splits of all spans of a group are counted together
                members_at = tl.arange(0, BLOCK_G)
                lengths_of_all = tl.load(lengths + first_span + members_at, mask=members_at < group_spans, other=common)
                counts_of_all = _split_count(common, lengths_of_all, window, most, least, BLOCK_N, LARGEST, CAP)
                expected = tl.sum(counts_of_all, 0) + shared_count
            tl.debug_barrier()  # every thread's part is written before the arrival is counted
            arrived = arrivals + first_span * G + head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == expected - 1:
                if group_spans == 1:
                    if SHARES:  # once more, for which no register is held
                        span_row = tl.load(rows + span).to(tl.int64)
                    inner = tl.arange(0, BLOCK_HEADS)
                    zeros = tl.zeros((BLOCK_HEADS,), tl.int32)
                    _combine(
                        out, sums, stats, zeros + span_row, zeros + span, zeros + count, head * GROUP + inner,
                        inner < GROUP, kept, out_stride, d, G, GROUP, D, BLOCK_HEADS, BLOCK_D, SIDE,
                    )  # fmt: skip
                elif SHARES:
                    is_row = r < group_spans * GROUP
                    each = first_span + r // GROUP
                    its_row = tl.load(rows + each, mask=is_row, other=0).to(tl.int64)
                    its_length = tl.load(lengths + each, mask=is_row, other=common)
                    its_count = _split_count(common, its_length, window, most, least, BLOCK_N, LARGEST, CAP)
                    _combine(
                        out, sums, stats, its_row, each, its_count + shared_count, heads, is_row, kept, out_stride, d,
                        G, GROUP, D, BLOCK_G, BLOCK_D, 1,
                    )  # fmt: skip
                tl.store(arrived, 0)


def decode(
    qkv: Tensor,  # [T, (Q + 2 G) * D], after normalization and rotation
    spans: PagedSpans,
    pages: LayerPages,
    heads: tuple[int, int],
    window: int | None,
    out: Tensor,  # [T, Q * D]
    arrivals: Tensor | None = None,
) -> None:
    """Compute grouped-query attention of one token per span. Overwrites row `spans.rows[b]` of `out` for each span b.

    The pages must already hold the new token's key and value. Spans of length 0 write nothing.

    Semantics: `out[rows[b], h] = softmax(q[rows[b], h] k / sqrt(D)) v`, with the keys and values of the last `window`
    positions of span b, and the key head `h * G // Q`.

    Args:
        heads: (Q, G).
        window: number of tokens that each token attends to, itself included; None for no limit.
        arrivals: int32 zeros, at least B * G, which the launch leaves zero. None to let a launch make them.
    """
    if qkv.is_cuda:
        decode_triton(qkv, spans, pages, heads, window, out, arrivals)
    else:
        decode_torch(qkv, spans, pages, heads, window, out)


def decode_triton(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor,
    arrivals: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute `decode` with Triton."""
    (queries, key_heads), (page, width) = heads, pages.keys.shape[2:]
    batch, held = spans.table.shape
    block_d, group = max(16, triton.next_power_of_2(width)), queries // key_heads
    reach = NO_WINDOW if window is None else window
    most_keys = min(held * page, reach + _BLOCK_KEYS)
    most, least = _rule(_SPLITS, batch, _WHOLE)
    kept = min(max(min(triton.cdiv(most_keys, least), most), triton.cdiv(most_keys, _LARGEST_SPLIT)), _MOST_SPLITS)
    most_shared, least_shared = _rule(_SHARED_SPLITS, batch, _SHARED_OTHERWISE)
    groups = spans.groups if window is None else None
    if groups is not None:
        kept += min(triton.cdiv(held * page, least_shared), most_shared)
    shape = (batch, kept, queries) if kept > 1 else (1,)
    sums = torch.empty((*shape, width), dtype=torch.float32, device=qkv.device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=qkv.device)
    if arrivals is None:
        make = torch.zeros if kept > 1 else torch.empty
        arrivals = make(batch * key_heads, dtype=torch.int32, device=qkv.device)
    chained = is_hopper(qkv.device)
    programs = min(_PROGRAMS * processors_of(qkv.device), batch * key_heads * kept)
    split_kernel[(programs,)](
        qkv, *descriptors_of(pages, block_d, _BLOCK_KEYS), *pages, out, sums, stats, arrivals, spans.rows,
        spans.lengths, spans.table, *(groups or [spans.lengths] * 3), batch, spans.table.stride(0), reach, most, least,
        kept, log2_scale(width), qkv.stride(0), out.stride(0),
        G=key_heads, GROUP=group, D=width, BLOCK_D=block_d, BLOCK_G=max(_ROWS, triton.next_power_of_2(group)),
        BLOCK_HEADS=triton.next_power_of_2(group), BLOCK_B=max(16, triton.next_power_of_2(batch)), PAGE=page,
        BLOCK_N=_BLOCK_KEYS, LARGEST=_LARGEST_SPLIT, CAP=_MOST_SPLITS, SIDE=_SIDE, MOST_SHARED=most_shared,
        LEAST_SHARED=least_shared, SHARES=groups is not None,
        STAGES=_STAGES if qkv.element_size() == 2 else 2, PRECISION=precision_of(qkv), CHAINED=chained,
        num_warps=_WARPS, launch_pdl=chained,
    )  # fmt: skip


def _rule(rules: Sequence[tuple[int, int, int]], spans: int, otherwise: tuple[int, int]) -> tuple[int, int]:
    return next(((most, least) for spans_up_to, most, least in rules if spans <= spans_up_to), otherwise)


def descriptors_of(pages: LayerPages, block_d: int, block_keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors of keys and values as rows: `[pages * G * page tokens, D]`, for blocks within a page."""
    width = pages.keys.shape[3]
    keys, values = (TensorDescriptor.from_tensor(part.view(-1, width), [block_keys, block_d]) for part in pages)
    return keys, values


def log2_scale(width: int) -> float:
    """Return the factor of scores whose softmax is computed with powers of two."""
    return math.log2(math.e) / math.sqrt(width)
