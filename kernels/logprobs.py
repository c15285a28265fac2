"""Logprobs of given tokens, and the largest logprobs of a row with their tokens.

Letters: N rows of logits, V vocabulary.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.candidates import WAYS, extents, gather, row_places, threshold_of
from ranklet.kernels.sample import GROUP, Scan, joined
from ranklet.kernels.sampling_flags import FLAGS, TOP, TOPS, column_of
from ranklet.kernels.sampling_row import PIECE, TOP_LOGPROBS

CAPACITY: Final = 1024  # candidates of a row
_NO_ID = tl.constexpr(0x7FFFFFFF)
_SLOTS = tl.constexpr(triton.next_power_of_2(TOP_LOGPROBS))


@triton.jit
def top_kernel(
    logits, stride, columns, statistics, groups, blocks, values, ids, top_ids, top_logprobs, V, pieces,
    PIECES: tl.constexpr, LENGTH: tl.constexpr, IN_GROUP: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
    BATCH: tl.constexpr, WAYS: tl.constexpr, ALL_ASK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if not ALL_ASK:
        if (column_of(columns, row, FLAGS) & TOP) == 0:
            return
    group_count = pieces * (LENGTH // IN_GROUP)
    source, groups, blocks, values, ids = row_places(
        row, logits, stride, groups, group_count, blocks, values, ids, MOST
    )
    peak, total = joined(statistics + row * pieces * 2, pieces, PIECES)
    total = peak + tl.log(total)
    least, largest, count = extents(groups, group_count, 1.0, TILE)
    pivot = float("-inf")
    if count > TOPS:
        pivot, _ = threshold_of(groups, group_count, 1.0, TOPS * 1.0, least, largest, 0.0, False, TILE, WAYS)
    found = gather(source, V, 1.0, groups, group_count, pivot, blocks, values, ids, MOST, IN_GROUP, TILE, BATCH)

    slots = tl.arange(0, _SLOTS)
    lanes = tl.arange(0, TILE)
    chosen = tl.full([_SLOTS], -1, tl.int32)
    logits_of = tl.full([_SLOTS], float("-inf"), tl.float32)
    last = float("inf")
    last_id = -1
    is_short = found <= MOST
    length = tl.where(is_short, found, V)
    for slot in range(TOPS):
        # The largest value that follows the last one in the order (value downwards, token id upwards).
        best = tl.full([], float("-inf"), tl.float32)
        choice = _NO_ID
        for start in range(0, length, TILE):
            inside = start + lanes < length
            if is_short:
                value = tl.load(values + start + lanes, mask=inside, other=float("-inf"))
                token = tl.load(ids + start + lanes, mask=inside, other=_NO_ID)
            else:
                value = tl.load(source + start + lanes, mask=inside, other=float("-inf"))
                token = start + lanes
            follows = (value < last) | ((value == last) & (token > last_id))
            value = tl.where(follows, value, float("-inf"))
            largest = tl.max(value, 0)
            first = tl.min(tl.where(value == largest, tl.where(follows, token, _NO_ID), _NO_ID), 0)
            choice = tl.where(largest > best, first, choice)
            best = tl.maximum(best, largest)
        chosen = tl.where(slots == slot, tl.where(best > float("-inf"), choice, -1), chosen)
        logits_of = tl.where(slots == slot, best, logits_of)
        last = best
        last_id = choice
    tl.store(top_ids + row * TOPS + slots, chosen, mask=slots < TOPS)
    tl.store(top_logprobs + row * TOPS + slots, logits_of - total, mask=slots < TOPS)


@triton.jit
def target_kernel(logits, stride, targets, statistics, logprobs, pieces, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(logits + row * stride + tl.load(targets + row))
    peak, total = joined(statistics + row * pieces * 2, pieces, PIECES)
    tl.store(logprobs + row, own - peak - tl.log(total))


def top_logprobs(
    logits: Tensor,  # float32 [N, V]
    scanned: Scan,
    columns: Tensor | None,  # int32 [N, ROW_WIDTH]: which rows ask; None if all do
) -> tuple[Tensor, Tensor]:
    """Return ids int32 [N, TOP_LOGPROBS] and logprobs of the largest logits of each row, ties by the lower id.

    Places that the vocabulary cannot fill have id -1 and logprob -inf. Rows that do not ask have any values.
    """
    (rows, pieces), device = scanned.best.shape, logits.device
    ids = torch.empty((rows, TOP_LOGPROBS), dtype=torch.int32, device=device)
    values = torch.empty((rows, TOP_LOGPROBS), dtype=torch.float32, device=device)
    room = torch.empty((3, rows, CAPACITY), dtype=torch.int32, device=device)
    top_kernel[(rows,)](
        logits, logits.stride(0), ids if columns is None else columns, scanned.raw, scanned.raw_groups, room[0],
        room[1].view(torch.float32), room[2], ids, values, logits.shape[1], pieces,
        PIECES=triton.next_power_of_2(pieces), LENGTH=PIECE, IN_GROUP=GROUP, MOST=CAPACITY, TILE=1024, BATCH=32,
        WAYS=WAYS, ALL_ASK=columns is None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return ids, values


def target_logprobs(
    logits: Tensor,  # float32 [N, V]
    targets: Tensor,  # int32 [N]
    scanned: Scan,
) -> Tensor:
    """Return the logprob of one given token of each row, float32 [N]."""
    rows, pieces = scanned.best.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    target_kernel[(rows,)](
        logits, logits.stride(0), targets, scanned.raw, out, pieces, PIECES=triton.next_power_of_2(pieces), num_warps=1
    )
    return out


def logprobs_at(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logprob of one given token of each row, float32 [N]: the twin of `target_logprobs` in torch."""
    own = logits.gather(1, targets[:, None].long())[:, 0]
    return own - torch.logsumexp(logits, 1)


def largest_logprobs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and logprobs of the largest logits of each row: the twin of `top_logprobs` in torch."""
    count = min(TOP_LOGPROBS, logits.shape[1])
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :count]
    value = logits.gather(1, order)
    ids = torch.full((len(logits), TOP_LOGPROBS), -1, dtype=torch.int32)
    values = torch.full((len(logits), TOP_LOGPROBS), -torch.inf)
    ids[:, :count] = torch.where(value > -torch.inf, order, -1).int()
    values[:, :count] = value - torch.logsumexp(logits, 1, keepdim=True)
    return ids, values
