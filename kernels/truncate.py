"""Draws tokens of rows with top_k, top_p or min_p: finds the threshold of the kept tokens, then draws among these.

The kept tokens are the first of an order by (logit downwards, token id upwards), so ties at the threshold go to the
lower ids. Letters: N rows of logits, V vocabulary.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.candidates import WAYS, extents, gather, measured, row_places, threshold_of
from ranklet.kernels.noise import gumbel_at, gumbel_run, seed_of
from ranklet.kernels.sample import GROUP, Scan, joined
from ranklet.kernels.sampling_flags import (
    CHANGE,
    FLAGS,
    MIN_P,
    POSITION,
    SCALE,
    SEED_HIGH,
    SEED_LOW,
    TOP_K,
    TOP_P,
    TRUNCATE,
    column_of,
    float_of,
)
from ranklet.kernels.sampling_row import CHANGING, PIECE, Column, Feature

CAPACITY: Final = 4096  # candidates of a row
EXPECTED: Final = 512  # groups to gather where top_k does not say how many tokens are kept
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _best_of(value, token, best, choice):
    largest = tl.max(value, 0)
    first = tl.min(tl.where(value == largest, token, _NO_ID), 0)
    is_better = largest > best
    return tl.where(is_better, largest, best), tl.where(is_better, first, choice)


@triton.jit
def _kept(value, threshold, quota, ties):
    is_tie = (value == threshold).to(tl.int32)
    rank = ties + tl.cumsum(is_tie, 0)
    return (value > threshold) | ((is_tie != 0) & (rank <= quota)), ties + tl.sum(is_tie, 0)


@triton.jit
def _threshold(
    source, length, scale, columns, row, peak, total,
    TILE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    # Returns the least kept value, and how many tokens of exactly this value are kept.
    cut = peak + float_of(columns, row, MIN_P)
    top_k = column_of(columns, row, TOP_K)
    top_p = float_of(columns, row, TOP_P)
    least, largest, count = extents(source, length, scale, TILE)
    threshold = cut
    quota = 0x7FFFFFFF
    if (top_k > 0) & (top_k < count):
        found, above = threshold_of(
            source, length, scale, top_k.to(tl.float32), least, largest, peak, False, TILE, WAYS
        )
        if found >= cut:
            threshold = found
            quota = top_k - above.to(tl.int32)
    if top_p < 1:
        # Candidates may be exactly the k largest, and then weigh less than the whole row.
        if (threshold > float("-inf")) | (top_k > 0):
            total, ties = measured(source, length, scale, threshold, peak, TILE)
            total += tl.minimum(ties, quota).to(tl.float32) * tl.exp(threshold - peak)
        goal = top_p * total
        found, above = threshold_of(source, length, scale, goal, least, largest, peak, True, TILE, WAYS)
        if found >= threshold:
            most = tl.maximum(tl.ceil((goal - above) / tl.exp(found - peak)), 1.0)
            most = tl.minimum(most, 1e9).to(tl.int32)
            quota = tl.where(found > threshold, most, tl.minimum(most, quota))
            threshold = found
    return threshold, quota


@triton.jit
def truncate_kernel(
    logits, stride, changed, columns, statistics, groups, blocks, values, ids, drawn, V, pieces,
    CHANGES: tl.constexpr, PIECES: tl.constexpr, LENGTH: tl.constexpr, IN_GROUP: tl.constexpr, MOST: tl.constexpr,
    USUAL: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr, WAYS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    flags = column_of(columns, row, FLAGS)
    if (flags & TRUNCATE) == 0:
        return
    group_count = pieces * (LENGTH // IN_GROUP)
    source, groups, blocks, values, ids = row_places(
        row, logits, stride, groups, group_count, blocks, values, ids, MOST
    )
    if CHANGES:
        if flags & CHANGE:
            source = changed + row * V
    scale = float_of(columns, row, SCALE)
    top_k = column_of(columns, row, TOP_K)
    cut = float_of(columns, row, MIN_P)
    peak, total = joined(statistics + row * pieces * 2, pieces, PIECES)
    cut += peak

    # The k-th largest of the groups' largest values is a lower bound of the k-th largest value.
    has_few = (top_k > 0) & (top_k <= USUAL)
    wanted = tl.where(has_few, top_k, USUAL)
    least, largest, count = extents(groups, group_count, 1.0, TILE)
    pivot = float("-inf")
    if count > wanted:
        pivot, _ = threshold_of(
            groups, group_count, 1.0, wanted.to(tl.float32), least, largest, peak, False, TILE, WAYS
        )
    pivot = tl.maximum(pivot, cut)
    found = gather(source, V, scale, groups, group_count, pivot, blocks, values, ids, MOST, IN_GROUP, TILE, BATCH)
    # Candidates are enough if they hold all tokens that min_p keeps, the k largest, or the mass that top_p keeps.
    is_short = (found <= MOST) & (has_few | (pivot <= cut))
    if (found <= MOST) & (is_short == 0) & (top_k == 0) & (cut == float("-inf")):
        mass, _ = measured(values, found, 1.0, float("-inf"), peak, TILE)
        is_short = mass >= float_of(columns, row, TOP_P) * total

    seed = seed_of(column_of(columns, row, SEED_LOW), column_of(columns, row, SEED_HIGH))
    position = column_of(columns, row, POSITION)
    lanes = tl.arange(0, TILE)
    best = float("-inf")
    choice = -1
    ties = 0
    if is_short:
        threshold, quota = _threshold(values, found, 1.0, columns, row, peak, total, TILE, WAYS)
        for start in range(0, found, TILE):
            inside = start + lanes < found
            value = tl.load(values + start + lanes, mask=inside, other=float("-inf"))
            token = tl.load(ids + start + lanes, mask=inside, other=0)
            kept, ties = _kept(value, threshold, quota, ties)
            noisy = tl.where(kept, value + gumbel_at(seed, position, token, FAST), float("-inf"))
            best, choice = _best_of(noisy, token, best, choice)
    else:
        threshold, quota = _threshold(source, V, scale, columns, row, peak, total, TILE, WAYS)
        for start in range(0, V, TILE):
            token = start + lanes
            value = tl.load(source + token, mask=token < V, other=float("-inf")) * scale
            kept, ties = _kept(value, threshold, quota, ties)
            noisy = tl.where(kept, value + gumbel_run(seed, position, start, TILE, FAST), float("-inf"))
            best, choice = _best_of(noisy, token, best, choice)
    tl.store(drawn + row, choice)


def draw_truncated(
    logits: Tensor,  # float32 [N, V]
    columns: Tensor,  # int32 [N, ROW_WIDTH]
    scanned: Scan,
    features: Feature,
) -> Tensor:
    """Return the tokens of the rows that truncate, int32 [N]. Other rows have any values."""
    (rows, pieces), device = scanned.best.shape, logits.device
    drawn = torch.empty(rows, dtype=torch.int32, device=device)
    room = torch.empty((3, rows, CAPACITY), dtype=torch.int32, device=device)
    truncate_kernel[(rows,)](
        logits, logits.stride(0), scanned.changed, columns, scanned.scaled, scanned.scaled_groups, room[0],
        room[1].view(torch.float32), room[2], drawn, logits.shape[1], pieces, CHANGES=bool(features & CHANGING),
        PIECES=triton.next_power_of_2(pieces), LENGTH=PIECE, IN_GROUP=GROUP, MOST=CAPACITY, USUAL=EXPECTED, TILE=2048,
        BATCH=64, WAYS=WAYS, FAST=logits.is_cuda, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return drawn


def truncated(scaled: Tensor, columns: Tensor) -> Tensor:
    """Return scaled logits [N, V] with -inf for the tokens that a row does not keep. The kernels' twin, by sorting."""
    out = scaled.clone()
    floats = columns.view(torch.float32)
    asks = (columns[:, Column.FLAGS] & Feature.TRUNCATE) != 0
    for row in asks.nonzero().flatten().tolist():
        order = torch.sort(scaled[row], descending=True, stable=True).indices
        value = scaled[row, order]
        kept = value >= value[0] + floats[row, Column.MIN_P]
        if top_k := int(columns[row, Column.TOP_K]):
            kept[top_k:] = False
        mass = torch.where(kept, (value - value[0]).exp(), 0.0).double()
        kept &= mass.cumsum(0) - mass < floats[row, Column.TOP_P] * mass.sum()
        out[row, order[~kept]] = -torch.inf
    return out
