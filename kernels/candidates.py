"""Finds thresholds in a row of logits without sorting it, and gathers the tokens above one. One program works on a row.

A `source` holds `length` float32 values: a row of logits, its gathered candidates, or the largest value of each group.
"""

from typing import Final

import triton
import triton.language as tl

WAYS: Final = 8  # parts into which a pass cuts the range of a threshold
_PASSES = tl.constexpr(64)  # enough for any float32; stops the search in a row with NaN


@triton.jit
def row_places(row, logits, stride, groups, group_count, blocks, values, ids, CAPACITY: tl.constexpr):
    """Return where a row's logits, groups, blocks, candidates and token ids begin; see `gather`."""
    room = row * CAPACITY
    return logits + row * stride, groups + row * group_count, blocks + room, values + room, ids + room


@triton.jit
def extents(source, length, scale, TILE: tl.constexpr):
    """Return the least and the largest finite value, and the number of finite values."""
    lanes = tl.arange(0, TILE)
    least = tl.full([TILE], float("inf"), tl.float32)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, length, TILE):
        value = tl.load(source + start + lanes, mask=start + lanes < length, other=float("-inf")) * scale
        is_finite = value > float("-inf")
        least = tl.minimum(least, tl.where(is_finite, value, float("inf")))
        largest = tl.maximum(largest, value)
        count += is_finite.to(tl.int32)
    return tl.min(least, 0), tl.max(largest, 0), tl.sum(count, 0)


@triton.jit
def threshold_of(
    source, length, scale, goal, least, largest, peak, BY_MASS: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr
):
    """Return the largest t among the values so that those >= t weigh at least `goal`, and the weight of those > t.

    A value weighs 1, or exp(value - peak). If all together weigh less than the goal, t is `least`.

    Args:
        least, largest: range of the finite values.
    """
    lanes = tl.arange(0, TILE)
    parts = tl.arange(0, WAYS)
    bottom = least  # values >= bottom weigh enough, values >= top do not
    top = largest + tl.maximum(tl.abs(largest) * 1e-6, 1e-30)
    above = 0.0
    passes = 0
    while (least < largest) & (passes < _PASSES):
        cuts = bottom + (top - bottom) * (parts.to(tl.float32) / WAYS)
        weights = tl.zeros([WAYS, TILE], tl.float32)
        low = tl.full([TILE], float("inf"), tl.float32)
        high = tl.full([TILE], float("-inf"), tl.float32)
        for start in range(0, length, TILE):
            value = tl.load(source + start + lanes, mask=start + lanes < length, other=float("-inf")) * scale
            weight = tl.exp(value - peak) if BY_MASS else tl.full([TILE], 1.0, tl.float32)
            weights += tl.where(value[None, :] >= cuts[:, None], weight[None, :], 0.0)
            is_open = (value >= bottom) & (value < top)
            low = tl.minimum(low, tl.where(is_open, value, float("inf")))
            high = tl.maximum(high, tl.where(is_open, value, float("-inf")))
        least = tl.min(low, 0)
        largest = tl.max(high, 0)
        if least < largest:
            sums = tl.sum(weights, 1)
            is_enough = (sums >= goal) | (parts == 0)
            above = tl.max(tl.where(is_enough, above, sums), 0)
            top = tl.min(tl.where(is_enough, top, cuts), 0)
            bottom = tl.maximum(tl.max(tl.where(is_enough, cuts, bottom), 0), least)
        passes += 1
    return tl.minimum(least, largest), above


@triton.jit
def measured(source, length, scale, threshold, peak, TILE: tl.constexpr):
    """Return the sum of exp(value - peak) of the values above the threshold, and the number of values equal to it."""
    lanes = tl.arange(0, TILE)
    mass = tl.zeros([TILE], tl.float32)
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, length, TILE):
        value = tl.load(source + start + lanes, mask=start + lanes < length, other=float("-inf")) * scale
        mass += tl.where(value > threshold, tl.exp(value - peak), 0.0)
        count += (value == threshold).to(tl.int32)
    return tl.sum(mass, 0), tl.sum(count, 0)


@triton.jit
def gather(
    row, V, scale, groups, group_count, least, blocks, values, ids,
    CAPACITY: tl.constexpr, IN_GROUP: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Copy the finite values >= `least` of a row and their token ids, in order of the ids.

    Reads only groups whose largest value is enough.

    Args:
        groups: the largest value of each group.
        blocks: int32 [CAPACITY], overwritten.
        values, ids: [CAPACITY], written.

    Returns the number of such values. If it is greater than CAPACITY, the copy is incomplete.
    """
    lanes = tl.arange(0, TILE)
    found = 0
    for start in range(0, group_count, TILE):
        value = tl.load(groups + start + lanes, mask=start + lanes < group_count, other=float("-inf"))
        is_kept = (value >= least) & (value > float("-inf"))
        rank = found + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(blocks + rank, start + lanes, mask=is_kept & (rank < CAPACITY))
        found += tl.sum(is_kept.to(tl.int32), 0)
    tl.debug_barrier()
    complete = tl.where(found > CAPACITY, 0, found)
    count = 0
    members = tl.arange(0, BATCH * IN_GROUP)
    for start in range(0, complete, BATCH):
        entry = start + members // IN_GROUP
        block = tl.load(blocks + entry, mask=entry < complete, other=0)
        token = block * IN_GROUP + members % IN_GROUP
        value = tl.load(row + token, mask=(entry < complete) & (token < V), other=float("-inf")) * scale
        is_kept = (value >= least) & (value > float("-inf"))
        rank = count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        is_stored = is_kept & (rank < CAPACITY)
        tl.store(values + rank, value, mask=is_stored)
        tl.store(ids + rank, token, mask=is_stored)
        count += tl.sum(is_kept.to(tl.int32), 0)
    tl.debug_barrier()
    return tl.where(found > CAPACITY, CAPACITY + 1, count)
