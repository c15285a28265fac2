"""Splits of the keys of pieces of prompts: which there are, and how their partial sums are combined.

For letters, see `prefill_attention`.
"""

import triton
import triton.language as tl


@triton.jit
def cut(count, length, window, M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    # Returns a span's tiles of M queries, the keys of a split, and the number of splits of a tile.
    tiles = (count + M - 1) // M
    keys = tl.minimum(length, window + M + BLOCK_N)  # of a tile, at most
    blocks = tl.maximum(MOST // tl.maximum(tiles, 1), 1) * BLOCK_N
    size = tl.maximum((keys + blocks - 1) // blocks * BLOCK_N, LEAST)
    return tiles, size, (keys + size - 1) // size


@triton.jit
def keys_of(query, count, length, window, M: tl.constexpr, BLOCK_N: tl.constexpr):
    # Returns the position of a tile's first query, the first block of keys that the tile reads, and its keys' end.
    begin = length - count + query
    return begin, tl.maximum(begin + 1 - window, 0) // BLOCK_N * BLOCK_N, tl.minimum(begin + M, length)


@triton.jit
def work_of(
    counts, lengths, spans, window, BLOCK_B: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    # Returns the queries and keys of every span, what `cut` says of it, the first of its slots of partial sums, and
    # whether it has several splits whose partial sums fit.
    every = tl.arange(0, BLOCK_B)
    count = tl.load(counts + every, mask=every < spans, other=0)
    length = tl.load(lengths + every, mask=every < spans, other=0)
    tiles, size, splits = cut(count, length, window, M, BLOCK_N, LEAST, MOST)
    slots = tl.where(splits > 1, tiles * splits, 0)
    ends = tl.cumsum(slots, 0)
    return count, length, tiles, size, splits, ends - slots, (splits > 1) & (ends <= KEPT)


@triton.jit
def find(item, ends, BLOCK_B: tl.constexpr):
    # Returns the span of an item, the item's index within the span, and the mask of that span.
    before = ends <= item
    span = tl.sum(before.to(tl.int32), 0)
    return span, item - tl.max(tl.where(before, ends, 0), 0), tl.arange(0, BLOCK_B) == span


@triton.jit
def pick(values, own):
    # Returns the value of the span that `find` has found. A sum takes less time than another load.
    return tl.sum(tl.where(own, values, 0), 0)


@triton.jit
def add_split(top, total, acc, next_top, next_total, next_acc):
    # Adds a split to the splits before it. Explicit `fma`, so that both kernels round alike.
    higher = tl.maximum(top, next_top)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    fade, next_fade = tl.exp2(top - base), tl.exp2(next_top - base)
    acc = tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), next_acc * next_fade[:, None])
    return higher, tl.fma(total, fade, next_total * next_fade), acc


@triton.jit(do_not_specialize=["window", "spans"], do_not_specialize_on_alignment=["rows", "counts", "lengths"])
def combine_splits_kernel(
    sums, stats, out, rows, counts, lengths, spans, window, out_stride,
    Q: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    KEPT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    M: tl.constexpr = BLOCK_M // SHARING
    H: tl.constexpr = Q // SHARING
    PARTS: tl.constexpr = BLOCK_M // BLOCK_R
    AT_ONCE: tl.constexpr = 8  # loads that do not wait for each other
    all_counts, all_lengths, all_tiles, all_sizes, all_splits, all_slots, fits = work_of(
        counts, lengths, spans, window, BLOCK_B, M, BLOCK_N, LEAST, MOST, KEPT
    )
    ends = tl.cumsum(tl.where(fits, all_tiles, 0), 0)
    d = tl.arange(0, BLOCK_D)
    for index in tl.range(tl.program_id(0), tl.max(ends, 0) * (H * PARTS), tl.num_programs(0), num_stages=1):
        span, tile, own = find(index // (H * PARTS), ends, BLOCK_B)
        group = index // PARTS % H
        m = index % PARTS * BLOCK_R + tl.arange(0, BLOCK_R)
        count = pick(all_counts, own)
        length = pick(all_lengths, own)
        size = pick(all_sizes, own)
        slot = pick(all_slots, own) + tile * pick(all_splits, own)
        _begin, low, end = keys_of(tile * M, count, length, window, M, BLOCK_N)
        used = (end - low + size - 1) // size
        row = tile * M + m // SHARING
        mask = (row < count)[:, None] & (d < D)[None, :]
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if used > 1:  # else `prefill_kernel` has written the rows
            for first in tl.range(0, used, AT_ONCE, num_stages=1):
                for split in tl.static_range(AT_ONCE):
                    there = first + split < used
                    line = ((slot + first + split) * H + group).to(tl.int64) * BLOCK_M + m
                    next_acc = tl.load(sums + line[:, None] * D + d[None, :], mask=mask & there, other=0.0)
                    next_top = tl.load(stats + line * 2, mask=(row < count) & there, other=float("-inf"))
                    next_total = tl.load(stats + line * 2 + 1, mask=(row < count) & there, other=0.0)
                    top, total, acc = add_split(top, total, acc, next_top, next_total, next_acc)
            packed = (tl.load(rows + span) + row).to(tl.int64)[:, None]
            heads = group * SHARING + m % SHARING
            at = out + packed * out_stride + heads[:, None] * D + d[None, :]
            total = tl.where(row < count, total, 1.0)
            tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
