"""Draws a token from each row of logits: a scan over pieces of the vocabulary, then a step that joins the pieces.

Letters: N rows of logits, V vocabulary, P pieces of the vocabulary, R rows of the state. A row's pieces do not depend
on the other rows, and so neither do its token and logprobs.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.adjust import SamplingTables, change
from ranklet.kernels.noise import gumbel, gumbel_run, seed_of
from ranklet.kernels.sampling_flags import (
    CHANGE,
    FLAGS,
    LOGPROB,
    NOISE,
    PENALIZE,
    POSITION,
    ROW,
    SCALE,
    SEED_HIGH,
    SEED_LOW,
    TOP,
    TRUNCATE,
    column_of,
    float_of,
)
from ranklet.kernels.sampling_row import CHANGING, PIECE, Column, Feature

GROUP: Final = 32  # tokens of a group; a scan keeps the largest logit of each
_NO_ID = tl.constexpr(0x7FFFFFFF)


class Scan(NamedTuple):
    """The results of a scan. A row fills only the tensors of the features that it asks for.

    Each piece has PIECE / GROUP groups, in order of their tokens; the last groups may lie beyond V. Statistics are the
    largest logit and the sum of exp(logit - largest). `scaled` logits are changed and divided by the temperature.
    """

    changed: Tensor  # float32 [N, V]: changed logits of rows that change and truncate; other rows have any values
    best: Tensor  # float32 [N, P]: largest scaled logit with noise
    ids: Tensor  # int32 [N, P]: its token; -1 if a logit is NaN or infinite
    raw: Tensor  # float32 [N, P, 2]: statistics of the raw logits
    scaled: Tensor  # float32 [N, P, 2]: statistics of the scaled logits
    raw_groups: Tensor  # float32 [N, P * PIECE / GROUP]: largest raw logit of each group
    scaled_groups: Tensor  # float32 [N, P * PIECE / GROUP]


@triton.jit
def _statistics(value, out):
    largest = tl.max(value, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(out, largest)
    tl.store(out + 1, tl.sum(tl.exp(value - base), 0))


@triton.jit
def joined(statistics, pieces, PIECES: tl.constexpr):
    """Join the statistics of a row's pieces. Returns the largest logit, and the sum of exp(logit - largest)."""
    lanes = tl.arange(0, PIECES)
    maxima = tl.load(statistics + lanes * 2, mask=lanes < pieces, other=float("-inf"))
    sums = tl.load(statistics + lanes * 2 + 1, mask=lanes < pieces, other=0.0)
    peak = tl.max(maxima, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return base, tl.sum(sums * tl.exp(maxima - base), 0)


@triton.jit
def scan_kernel(
    logits, stride, changed, columns, counts, edits, masks, best, ids, raw, scaled, raw_groups, scaled_groups, V,
    COUNTED, WORDS, LISTED, FEATURES: tl.constexpr, LENGTH: tl.constexpr, IN_GROUP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    flags = column_of(columns, row, FLAGS)
    tokens = piece * LENGTH + tl.arange(0, LENGTH)
    inside = tokens < V
    place = row * tl.num_programs(1) + piece
    GROUPS: tl.constexpr = LENGTH // IN_GROUP
    groups = place * GROUPS + tl.arange(0, GROUPS)
    logits += row * stride
    value = tl.load(logits + tokens, mask=inside, other=float("-inf"))
    if LOGPROB & FEATURES:
        if flags & LOGPROB:
            _statistics(value, raw + place * 2)
    if TOP & FEATURES:
        if flags & TOP:
            tl.store(raw_groups + groups, tl.max(tl.reshape(value, [GROUPS, IN_GROUP]), 1))
    if CHANGE & FEATURES:
        if flags & CHANGE:
            kept = column_of(columns, row, ROW).to(tl.int64)
            value = change(
                value, tokens, inside, piece, flags, columns, row, logits, counts + kept * COUNTED,
                edits + kept * 3 * LISTED, masks + kept * WORDS, changed + row * V, LISTED, FEATURES, LENGTH, 128,
            )  # fmt: skip
    is_bad = tl.max((value < float("inf")).to(tl.int32) ^ 1, 0)
    if NOISE & FEATURES:
        value *= float_of(columns, row, SCALE)
        if TRUNCATE & FEATURES:
            if flags & TRUNCATE:
                _statistics(value, scaled + place * 2)
                tl.store(scaled_groups + groups, tl.max(tl.reshape(value, [GROUPS, IN_GROUP]), 1))
        if (flags & (NOISE | TRUNCATE)) == NOISE:
            seed = seed_of(column_of(columns, row, SEED_LOW), column_of(columns, row, SEED_HIGH))
            value += gumbel_run(seed, column_of(columns, row, POSITION), piece * LENGTH, LENGTH, FAST)
    largest = tl.max(value, 0)
    token = tl.min(tl.where(value == largest, tokens, _NO_ID), 0)
    tl.store(best + place, largest)
    tl.store(ids + place, tl.where(is_bad != 0, -1, token))


@triton.jit
def finish_kernel(
    logits, stride, columns, best, ids, raw, drawn, counts, last_token, tokens, logprobs, COUNTED, pieces,
    FEATURES: tl.constexpr, PIECES: tl.constexpr, KEEPS_LAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    flags = column_of(columns, row, FLAGS) & FEATURES
    lanes = tl.arange(0, PIECES)
    inside = lanes < pieces
    place = row * pieces + lanes
    value = tl.load(best + place, mask=inside, other=float("-inf"))
    token = tl.load(ids + place, mask=inside, other=_NO_ID)
    largest = tl.max(value, 0)
    is_bad = (tl.min(token, 0) < 0) | (largest == float("-inf"))
    token = tl.min(tl.where(value == largest, token, _NO_ID), 0)
    if TRUNCATE & FEATURES:
        if flags & TRUNCATE:
            token = tl.load(drawn + row)
    token = tl.where(is_bad, -1, token)
    tl.store(tokens + row, token)
    if LOGPROB & FEATURES:
        if flags & LOGPROB:
            peak, total = joined(raw + row * pieces * 2, pieces, PIECES)
            own = tl.load(logits + row * stride + tl.maximum(token, 0))
            tl.store(logprobs + row, tl.where(token < 0, float("nan"), own - peak - tl.log(total)))
    kept = column_of(columns, row, ROW).to(tl.int64)
    if KEEPS_LAST:
        tl.store(last_token + kept, tl.maximum(token, 0))
    if PENALIZE & FEATURES:
        if flags & PENALIZE:
            if token >= 0:
                count = tl.load(counts + kept * COUNTED + token)
                tl.store(counts + kept * COUNTED + token, tl.where((count & 0x7FFF) == 0x7FFF, count, count + 1))


def scan(
    logits: Tensor,  # float32 [N, V], rows may be further apart than V
    columns: Tensor,  # int32 [N, ROW_WIDTH]
    tables: SamplingTables,
    features: Feature,
) -> Scan:
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, PIECE)
    made = empty_scan(rows, vocab, features, logits.device)
    counts = tables.counts if tables.counts is not None else columns
    edits = tables.edits if tables.edits is not None else columns
    masks = tables.masks if tables.masks is not None else columns
    scan_kernel[(rows, pieces)](
        logits, logits.stride(0), made.changed, columns, counts, edits, masks, *made[1:], vocab, counts.shape[-1],
        masks.shape[-1], edits.shape[-1], FEATURES=int(features), LENGTH=PIECE, IN_GROUP=GROUP, FAST=logits.is_cuda,
        num_warps=4, maxnreg=128, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def empty_scan(rows: int, vocab: int, features: Feature, device: torch.device) -> Scan:
    """Return uninitialized tensors; those that no row asks for have a single element."""

    def empty(feature: Feature, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if feature in features else (1,), dtype=dtype, device=device)

    none, pieces = Feature(0), triton.cdiv(vocab, PIECE)
    groups = pieces * (PIECE // GROUP)
    stores = features & Feature.EDIT or (features & Feature.TRUNCATE and features & CHANGING)
    return Scan(
        torch.empty((rows, vocab) if stores else 1, dtype=torch.float32, device=device),
        empty(none, rows, pieces), empty(none, rows, pieces, dtype=torch.int32),
        empty(Feature.LOGPROB, rows, pieces, 2), empty(Feature.TRUNCATE, rows, pieces, 2),
        empty(Feature.TOP, rows, groups), empty(Feature.TRUNCATE, rows, groups),
    )  # fmt: skip


def finish(
    logits: Tensor,  # float32 [N, V]
    columns: Tensor,  # int32 [N, ROW_WIDTH]
    scanned: Scan,
    drawn: Tensor | None,  # int32 [N]: tokens of truncated rows
    counts: Tensor | None,  # int16 [R + 1, V or more], written
    last_token: Tensor | None,  # int32 [R + 1], written
    features: Feature,
) -> tuple[Tensor, Tensor | None]:
    """Join the pieces. Returns tokens int32 [N], -1 for invalid rows, and logprobs float32 [N] if a row asks."""
    (rows, pieces), device = scanned.best.shape, logits.device
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device) if features & Feature.LOGPROB else None
    compiled = features & (Feature.TRUNCATE | Feature.LOGPROB | Feature.PENALIZE)
    finish_kernel[(rows,)](
        logits, logits.stride(0), columns, scanned.best, scanned.ids, scanned.raw, tokens if drawn is None else drawn,
        tokens if counts is None else counts, tokens if last_token is None else last_token, tokens,
        tokens if logprobs is None else logprobs, 1 if counts is None else counts.shape[1], pieces,
        FEATURES=int(compiled), PIECES=triton.next_power_of_2(pieces), KEEPS_LAST=last_token is not None, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, logprobs


def scaled(logits: Tensor, columns: Tensor) -> Tensor:
    """Return logits divided by the temperature of their row: the twin of a part of the scan."""
    return logits * columns.view(torch.float32)[:, Column.SCALE, None]


def noise_of(columns: Tensor, vocab: int) -> Tensor:
    """Return the noise of all tokens of each row, float32 [N, vocab]; 0 for greedy rows."""
    noise = torch.zeros(len(columns), vocab)
    asks = (columns[:, Column.FLAGS] & Feature.NOISE) != 0
    if asks.any():
        part = columns[asks]
        seeds = part[:, Column.SEED_HIGH].long() << 32 | part[:, Column.SEED_LOW].long() & 0xFFFFFFFF
        noise[asks] = gumbel(seeds, part[:, Column.POSITION], vocab)
    return noise
