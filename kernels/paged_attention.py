"""Attention of one new token per sequence over keys and values in pages, as a decode step needs it.

A program computes a part of a sequence's keys, a split, for one key head. The program that finishes a sequence's last
split combines them, in their order. The size of a split depends on the sequence's length and on whether the batch has
one sequence, few or many (`_SPLITS`), but not on the other sequences. Programs compute their splits from the lengths in
device memory, so one CUDA graph serves all lengths.

Letters: T tokens of the batch, Q query heads, G key heads, D head width, B spans, P pages of a span. After
Flash-Decoding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.launch import is_hopper, precision_of, processors_of

PAGE_TOKENS = 64
NO_WINDOW = 1 << 30
# Rows: a number of spans up to which the row counts, the most splits of a span, and the fewest tokens of a split. An
# H200 runs 528 programs at once, and a model has about 8 key heads. Longer spans have more splits of the largest size.
_SPLITS = ((1, 32, 64), (4, 16, 128), (16, 4, 128))
_WHOLE = (1, PAGE_TOKENS)  # for more spans, which fill the GPU unsplit
_LARGEST_SPLIT = 2048  # tokens
_MOST_SPLITS = 32  # of a span; with more tokens, its splits are larger
_SIDE = 8  # splits that are combined side by side
_BLOCK_KEYS = 64
_PROGRAMS = 12  # per processor, which holds 4: later programs even out sequences of different lengths
_WARPS = 2  # fewer warps let more programs share a processor, which hides the start of each
_STAGES = 3


class LayerPages(NamedTuple):
    """The keys and values of one layer."""

    keys: Tensor  # [pages, G, 64, D], after normalization and rotation; contiguous
    values: Tensor  # [pages, G, 64, D], contiguous


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """Spans of packed tokens that attend to keys in pages."""

    rows: Tensor  # int32 [B]: first packed token of each span
    counts: Tensor  # int32 [B]: query tokens of each span; 1 for decode, 0 for a filler
    lengths: Tensor  # int32 [B]: keys of each span, this step's tokens included; 0 for a filler
    table: Tensor  # int32 [B, P]: pages; entries past the length are any number
    longest_query: int  # upper bound on the counts


@triton.jit
def _splits(length, window, most, least, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr, CAP: tl.constexpr):
    # Returns the first key that is read, the tokens of a split, and the number of splits.
    begin = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    keys = length - begin
    count = tl.minimum((keys + least - 1) // least, most)
    count = tl.minimum(tl.maximum(count, (keys + LARGEST - 1) // LARGEST), CAP)
    size = tl.maximum((keys + count * BLOCK_N - 1) // tl.maximum(count * BLOCK_N, 1), 1) * BLOCK_N
    return begin, size, (keys + size - 1) // size


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
def _combined(
    sums, stats, first_split, head, count, d,
    G: tl.constexpr, GROUP: tl.constexpr, BLOCK_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    # Returns a span's output for the query heads of one key head, SIDE splits at a time.
    inner = tl.arange(0, BLOCK_HEADS)
    split = tl.arange(0, SIDE)
    top = tl.full((BLOCK_HEADS,), -1e38, tl.float32)  # finite, so that heads past GROUP give no NaN
    total = (inner >= GROUP).to(tl.float32)
    mixed = tl.zeros((BLOCK_HEADS, BLOCK_D), tl.float32)
    for first in tl.range(0, count, SIDE, num_stages=1):
        live = ((first + split) < count)[:, None] & (inner < GROUP)[None, :]
        index = (first_split + first + split)[:, None] * (G * GROUP) + (head * GROUP + inner)[None, :]
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
    return mixed / total[:, None]


@triton.jit(
    do_not_specialize=["window", "spans", "table_stride", "most", "least", "kept"],
    do_not_specialize_on_alignment=["rows", "lengths", "table"],
)
def split_kernel(
    qkv, keys_tma, values_tma, keys, values, out, sums, stats, arrivals, rows, lengths, table, spans, table_stride,
    window, most, least, kept, scale, qkv_stride, out_stride,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_B: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr,
    CAP: tl.constexpr, SIDE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    every = tl.arange(0, BLOCK_B)
    own = tl.load(lengths + every, mask=every < spans, other=0)
    _, _, counts = _splits(own, window, most, least, BLOCK_N, LARGEST, CAP)
    ends = tl.cumsum(counts, 0)
    group = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_group = (group < GROUP)[:, None] & (d < D)[None, :]
    for item in tl.range(tl.program_id(0), tl.sum(counts, 0) * G, tl.num_programs(0), num_stages=1):
        # Consecutive items are the key heads of one split.
        head = item % G
        before = ends <= item // G
        span = tl.sum(before.to(tl.int32), 0)
        split = item // G - tl.max(tl.where(before, ends, 0), 0)
        length = tl.load(lengths + span)
        row = tl.load(rows + span).to(tl.int64)
        begin, size, count = _splits(length, window, most, least, BLOCK_N, LARGEST, CAP)
        low = begin + split * size
        high = tl.minimum(low + size, length)
        heads = head * GROUP + group
        q = tl.load(qkv + row * qkv_stride + heads[:, None] * D + d[None, :], mask=in_group, other=0.0)
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
            at_out = out + row * out_stride + heads[:, None] * D + d[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=in_group)
        else:
            first_split = span.to(tl.int64) * kept
            index = (first_split + split) * (G * GROUP) + heads
            tl.store(sums + index[:, None] * D + d[None, :], acc, mask=in_group)
            tl.store(stats + index * 2, top, mask=group < GROUP)
            tl.store(stats + index * 2 + 1, total, mask=group < GROUP)
            tl.debug_barrier()  # every thread's part is written before the arrival is counted
            arrived = arrivals + span * G + head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
                inner = tl.arange(0, BLOCK_HEADS)
                mixed = _combined(sums, stats, first_split, head, count, d, G, GROUP, BLOCK_HEADS, D, BLOCK_D, SIDE)
                at_out = out + row * out_stride + (head * GROUP + inner)[:, None] * D + d[None, :]
                mask = (inner < GROUP)[:, None] & (d < D)[None, :]
                tl.store(at_out, mixed.to(out.dtype.element_ty), mask=mask)
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
    most, least = next((rule for spans_up_to, *rule in _SPLITS if batch <= spans_up_to), _WHOLE)
    kept = min(max(min(triton.cdiv(most_keys, least), most), triton.cdiv(most_keys, _LARGEST_SPLIT)), _MOST_SPLITS)
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
        spans.lengths, spans.table, batch, spans.table.stride(0), reach, most, least, kept, log2_scale(width),
        qkv.stride(0), out.stride(0),
        G=key_heads, GROUP=group, D=width, BLOCK_D=block_d, BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_HEADS=triton.next_power_of_2(group), BLOCK_B=max(16, triton.next_power_of_2(batch)), PAGE=page,
        BLOCK_N=_BLOCK_KEYS, LARGEST=_LARGEST_SPLIT, CAP=_MOST_SPLITS, SIDE=_SIDE,
        STAGES=_STAGES if qkv.element_size() == 2 else 2, PRECISION=precision_of(qkv), CHAINED=chained,
        num_warps=_WARPS, launch_pdl=chained,
    )  # fmt: skip


def descriptors_of(pages: LayerPages, block_d: int, block_keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors of keys and values as rows: `[pages * G * page tokens, D]`, for blocks within a page."""
    width = pages.keys.shape[3]
    keys, values = (TensorDescriptor.from_tensor(part.view(-1, width), [block_keys, block_d]) for part in pages)
    return keys, values


def log2_scale(width: int) -> float:
    """Return the factor of scores whose softmax is computed with powers of two."""
    return math.log2(math.e) / math.sqrt(width)


def decode_torch(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `decode` with torch, one span after the other."""
    for row, length, table in zip(spans.rows.tolist(), spans.lengths.tolist(), spans.table, strict=True):
        if length:
            attend_torch(qkv, slice(row, row + 1), length, table, pages, heads, window, out)


def attend_torch(
    qkv: Tensor, rows: slice, length: int, table: Tensor, pages: LayerPages, heads: tuple[int, int],
    window: int | None, out: Tensor,
) -> None:  # fmt: skip
    """Compute causal attention of one span in float32: packed rows `rows` are its last positions. Overwrites `out`."""
    queries, width = heads[0], pages.keys.shape[3]
    own = table[: -(-length // pages.keys.shape[2])].long()
    k, v = (part[own].transpose(0, 1).flatten(1, 2)[None, :, :length].float() for part in pages)
    q = qkv[rows, : queries * width].float().view(-1, queries, width).transpose(0, 1)[None]
    position = torch.arange(length, device=qkv.device)
    distance = position[length - q.shape[2] :, None] - position[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads[0] != heads[1])
    out[rows] = attended[0].transpose(0, 1).flatten(1).to(out.dtype)
