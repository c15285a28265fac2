"""Changes logits before a token is drawn.

Semantics, for each token: `x = logit + bias`; -inf if it is banned or not allowed; where prompt or output have the
token, `x *= repetition` if it is negative and `x /= repetition` otherwise; `x -= frequency * drawn`; where drawn > 0,
`x -= presence`. NaN stays NaN.

Letters: N rows of logits, V vocabulary, R rows of the state.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.sampling_flags import (
    EDIT,
    EDITS,
    FREQUENCY,
    MASK,
    PARDON,
    PENALIZE,
    PIECES_HIGH,
    PIECES_LOW,
    POSITION,
    PRESENCE,
    REPETITION,
    TRUNCATE,
    column_of,
    float_of,
)
from ranklet.kernels.sampling_row import CHANGING, Column, Feature

MOST_COUNTED: Final = 0x7FFF
_COUNTED = tl.constexpr(MOST_COUNTED)


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """State of each sequence on the device. A table is None until a sequence needs it.

    Attributes:
        counts: int16 [R + 1, V or more]: the lower 15 bits count how often the token was drawn, up to 32,767; the sign
            bit is set if the prompt has the token.
        edits: int32 [R + 1, 3, edits]: token ids, bits of their biases, positions where their bans end.
        masks: int32 [R + 1, ceil(V / 32) or more]: bit t % 32 of word t // 32 allows token t.
    """

    counts: Tensor | None = None
    edits: Tensor | None = None
    masks: Tensor | None = None


@triton.jit
def _changed(value, tokens, inside, flags, columns, row, counts, masks, FEATURES: tl.constexpr):
    if MASK & FEATURES:
        if flags & MASK:
            word = tl.load(masks + tokens // 32, mask=inside, other=0)
            allowed = ((word >> (tokens % 32)) & 1) != 0
            # NaN must stay, so that the row is found invalid.
            value = tl.where(allowed | (value != value), value, float("-inf"))
    if PENALIZE & FEATURES:
        if flags & PENALIZE:
            count = tl.load(counts + tokens, mask=inside, other=0).to(tl.int32)
            drawn = count & _COUNTED
            factor = tl.where(value > 0, float_of(columns, row, PARDON), float_of(columns, row, REPETITION))
            value = tl.where(count != 0, value * factor, value)
            value -= float_of(columns, row, FREQUENCY) * drawn.to(tl.float32)
            value -= tl.where(drawn > 0, float_of(columns, row, PRESENCE), 0.0)
    return value


@triton.jit
def change(
    value, tokens, inside, piece, flags, columns, row, logits, counts, edits, masks, out, LISTED,
    FEATURES: tl.constexpr, LENGTH: tl.constexpr, EDIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the changed logits of a piece of LENGTH tokens, and store them if the row truncates.

    Args:
        value: logits of these tokens.
        logits, counts, edits, masks, out: the row's part of each tensor.
        LISTED: largest number of tokens in `edits`.
    """
    value = _changed(value, tokens, inside, flags, columns, row, counts, masks, FEATURES)
    edited_here = False
    if EDIT & FEATURES:
        first = piece * LENGTH
        word = column_of(columns, row, PIECES_LOW)
        if piece >= 32:
            word = column_of(columns, row, PIECES_HIGH)
        edited_here = ((flags & EDIT) != 0) & (((word >> (tl.minimum(piece, 63) % 32)) & 1) != 0)
    if ((flags & FEATURES & TRUNCATE) != 0) | edited_here:
        tl.store(out + tokens, value, mask=inside)
    if EDIT & FEATURES:
        if edited_here:
            tl.debug_barrier()  # other threads have stored these places: now they are stored again, then loaded
            position = column_of(columns, row, POSITION)
            count = column_of(columns, row, EDITS)
            for start in range(0, count, EDIT_BLOCK):
                entry = start + tl.arange(0, EDIT_BLOCK)
                token = tl.load(edits + entry, mask=entry < count, other=-1)
                mine = (token >= first) & (token < first + LENGTH)
                bias = tl.load(edits + LISTED + entry, mask=mine, other=0).to(tl.float32, bitcast=True)
                until = tl.load(edits + 2 * LISTED + entry, mask=mine, other=0)
                edited = tl.load(logits + token, mask=mine, other=0.0) + bias
                edited = _changed(edited, token, mine, flags, columns, row, counts, masks, FEATURES)
                banned = (position < until) & (edited == edited)
                tl.store(out + token, tl.where(banned, float("-inf"), edited), mask=mine)
            tl.debug_barrier()
            value = tl.load(out + tokens, mask=inside, other=float("-inf"))
    return value


def adjusted(logits: Tensor, columns: Tensor, tables: SamplingTables, features: Feature) -> Tensor:
    """Return the changed logits, and those of other rows unchanged: the twin of `change` in torch."""
    out = logits.clone()
    floats = columns.view(torch.float32)
    vocab = logits.shape[1]
    for row, flags in enumerate(columns[:, Column.FLAGS].tolist()):
        asked = Feature(flags) & features
        if not asked & CHANGING:
            continue
        value, kept = out[row], int(columns[row, Column.ROW])
        banned = torch.zeros(vocab, dtype=torch.bool)
        if asked & Feature.EDIT and tables.edits is not None:
            ids, biases, until = tables.edits[kept, :, : int(columns[row, Column.EDITS])]
            value[ids.long()] += biases.contiguous().view(torch.float32)
            banned[ids.long()] = until > columns[row, Column.POSITION]
        if asked & Feature.MASK and tables.masks is not None:
            bits = (tables.masks[kept, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
            banned |= bits.flatten()[:vocab] == 0
        if asked & Feature.PENALIZE and tables.counts is not None:
            count = tables.counts[kept, :vocab].int()
            drawn = count & MOST_COUNTED
            factor = torch.where(value > 0, floats[row, Column.PARDON], floats[row, Column.REPETITION])
            value = torch.where(count != 0, value * factor, value)
            value = value - floats[row, Column.FREQUENCY] * drawn
            value = torch.where(drawn > 0, value - floats[row, Column.PRESENCE], value)
        out[row] = torch.where(banned & ~value.isnan(), -torch.inf, value)
    return out
