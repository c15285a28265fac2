"""Attention of one new token per sequence over keys and values in pages, as a decode step needs it.

A program computes a part of a sequence's keys, a split, for one key head. A second launch combines the splits. The
size of a split depends only on the sequence's length, so a token's result does not depend on the other sequences of the
batch. Programs compute their splits from the lengths in device memory, so one CUDA graph serves all lengths.

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
_WHOLE = 384  # sequences with up to this many keys are not split
_LEAST_SPLIT = 256  # tokens; smaller splits cost more time to combine than they save
_MOST_SPLITS = 32  # of a sequence; with more tokens, its splits are larger
_BLOCK_KEYS = 64
_PROGRAMS = 8  # per processor
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
def _splits(length, window, WHOLE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK_N: tl.constexpr):
    # Returns the first key that is read, the tokens of a split, and the number of splits.
    begin = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    keys = length - begin
    size = tl.maximum((keys + MOST * BLOCK_N - 1) // (MOST * BLOCK_N) * BLOCK_N, LEAST)
    size = tl.where(keys <= WHOLE, WHOLE, size)
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


@triton.jit(
    do_not_specialize=["window", "spans", "table_stride"], do_not_specialize_on_alignment=["rows", "lengths", "table"]
)
def split_kernel(
    qkv, keys_tma, values_tma, keys, values, out, sums, stats, rows, lengths, table, spans, table_stride, window, scale,
    qkv_stride, out_stride,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    every = tl.arange(0, BLOCK_B)
    own = tl.load(lengths + every, mask=every < spans, other=0)
    _, _, counts = _splits(own, window, WHOLE, LEAST, MOST, BLOCK_N)
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
        begin, size, count = _splits(length, window, WHOLE, LEAST, MOST, BLOCK_N)
        low = begin + split * size
        high = tl.minimum(low + size, length)
        heads = head * GROUP + group
        q = tl.load(qkv + row * qkv_stride + heads[:, None] * D + d[None, :], mask=in_group, other=0.0)
        top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        whole = high // BLOCK_N * BLOCK_N
        for first in tl.range(low, whole, BLOCK_N, num_stages=STAGES):
            page = tl.load(table + span * table_stride + first // PAGE)
            line = (page * G + head) * PAGE + first % PAGE
            seen = first + n >= length - window
            top, total, acc = _add_block(
                q, keys_tma.load([line, 0]), values_tma.load([line, 0]), seen, top, total, acc, scale, PRECISION
            )
        if whole < high:  # the last page may hold NaN past the length, so a mask replaces the descriptors
            page = tl.load(table + span * table_stride + whole // PAGE).to(tl.int64)
            at = ((page * G + head) * PAGE + whole % PAGE + n)[:, None] * D + d[None, :]
            held = whole + n < length
            mask = held[:, None] & (d < D)[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
            seen = held & (whole + n >= length - window)
            top, total, acc = _add_block(q, k, v, seen, top, total, acc, scale, PRECISION)
        if count == 1:
            at_out = out + row * out_stride + heads[:, None] * D + d[None, :]
            tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=in_group)
        else:
            index = (span.to(tl.int64) * MOST + split) * (G * GROUP) + heads
            tl.store(sums + index[:, None] * D + d[None, :], acc, mask=in_group)
            tl.store(stats + index * 2, top, mask=group < GROUP)
            tl.store(stats + index * 2 + 1, total, mask=group < GROUP)


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["rows", "lengths"])
def combine_kernel(
    sums, stats, out, rows, lengths, window, out_stride,
    Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    span = tl.program_id(1)
    _, _, count = _splits(tl.load(lengths + span), window, WHOLE, LEAST, MOST, BLOCK_N)
    if count < 2:  # `split_kernel` has written the row
        return
    split = tl.arange(0, MOST)
    d = tl.arange(0, BLOCK_D)
    index = (span.to(tl.int64) * MOST + split) * Q + head
    top = tl.load(stats + index * 2, mask=split < count, other=float("-inf"))
    total = tl.load(stats + index * 2 + 1, mask=split < count, other=0.0)
    mask = (split < count)[:, None] & (d < D)[None, :]
    parts = tl.load(sums + index[:, None] * D + d[None, :], mask=mask, other=0.0)
    fade = tl.exp2(top - tl.max(top, 0))
    mixed = tl.sum(parts * fade[:, None], 0) / tl.sum(total * fade, 0)
    at = out + tl.load(rows + span).to(tl.int64) * out_stride + head * D + d
    tl.store(at, mixed.to(out.dtype.element_ty), mask=d < D)


def decode(
    qkv: Tensor,  # [T, (Q + 2 G) * D], after normalization and rotation
    spans: PagedSpans,
    pages: LayerPages,
    heads: tuple[int, int],
    window: int | None,
    out: Tensor,  # [T, Q * D]
) -> None:
    """Compute grouped-query attention of one token per span. Overwrites row `spans.rows[b]` of `out` for each span b.

    The pages must already hold the new token's key and value. Spans of length 0 write nothing.

    Semantics: `out[rows[b], h] = softmax(q[rows[b], h] k / sqrt(D)) v`, with the keys and values of the last `window`
    positions of span b, and the key head `h * G // Q`.

    Args:
        heads: (Q, G).
        window: number of tokens that each token attends to, itself included; None for no limit.
    """
    if qkv.is_cuda:
        decode_triton(qkv, spans, pages, heads, window, out)
    else:
        decode_torch(qkv, spans, pages, heads, window, out)


def decode_triton(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `decode` with Triton: one launch, or two if a span of the table's width has several splits."""
    (queries, key_heads), (page, width) = heads, pages.keys.shape[2:]
    batch, held = spans.table.shape
    block_d = max(16, triton.next_power_of_2(width))
    reach = NO_WINDOW if window is None else window
    most_keys = min(held * page, reach + _BLOCK_KEYS)
    most = 1 if most_keys <= _WHOLE else min(_MOST_SPLITS, triton.cdiv(most_keys, _LEAST_SPLIT))
    shape = (batch, _MOST_SPLITS, queries) if most > 1 else (1,)
    sums = torch.empty((*shape, width), dtype=torch.float32, device=qkv.device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=qkv.device)
    chained = is_hopper(qkv.device)
    programs = min(_PROGRAMS * processors_of(qkv.device), batch * key_heads * most)
    split_kernel[(programs,)](
        qkv, *descriptors_of(pages, block_d, _BLOCK_KEYS), *pages, out, sums, stats, spans.rows, spans.lengths,
        spans.table, batch, spans.table.stride(0), reach, log2_scale(width), qkv.stride(0), out.stride(0),
        G=key_heads, GROUP=queries // key_heads, D=width, BLOCK_D=block_d,
        BLOCK_G=max(16, triton.next_power_of_2(queries // key_heads)),
        BLOCK_B=max(16, triton.next_power_of_2(batch)), PAGE=page, BLOCK_N=_BLOCK_KEYS, WHOLE=_WHOLE,
        LEAST=_LEAST_SPLIT, MOST=_MOST_SPLITS, STAGES=_STAGES if qkv.element_size() == 2 else 2,
        PRECISION=precision_of(qkv), CHAINED=chained, num_warps=_WARPS, launch_pdl=chained,
    )  # fmt: skip
    if most > 1:
        combine_kernel[(queries, batch)](
            sums, stats, out, spans.rows, spans.lengths, reach, out.stride(0), Q=queries, D=width, BLOCK_D=block_d,
            BLOCK_N=_BLOCK_KEYS, WHOLE=_WHOLE, LEAST=_LEAST_SPLIT, MOST=_MOST_SPLITS, CHAINED=chained, num_warps=4,
            launch_pdl=chained,
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
