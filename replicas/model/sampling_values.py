"""The sampling parameters of one sequence, and the columns that carry them to the kernels."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.kernels.sampling_row import PIECE, ROW_WIDTH, Column, Feature

_LEAST_TEMPERATURE = 0.001  # keeps scaled logits far from the largest float


@dataclass(frozen=True, slots=True)
class SamplingValues:
    """Sampling of one sequence. Values are not checked; `GenerateParams` does that.

    Attributes:
        temperature: 0 chooses the largest logit.
        top_k: 0 keeps all tokens.
        seed: any int64. The noise of a token depends on the seed, the token's position and its id only.
        logit_bias: (token id, bias) pairs.
        banned_ids: tokens that may not be drawn at positions before `banned_until`.
        allowed_token_ids: the only tokens that may be drawn; None allows all.
        has_grammar: whether the caller sets the mask of allowed tokens before each draw.
        logprobs: number of largest logprobs; 0 asks for the drawn token's only, None for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()
    banned_until: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    has_grammar: bool = False
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def features(self) -> Feature:
        found = Feature(0)
        if not self.is_greedy:
            found |= Feature.NOISE
            if self.top_k > 0 or self.top_p < 1 or self.min_p > 0:
                found |= Feature.TRUNCATE
        if self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1:
            found |= Feature.PENALIZE
        if self.logit_bias or self.banned_ids:
            found |= Feature.EDIT
        if self.allowed_token_ids is not None or self.has_grammar:
            found |= Feature.MASK
        if self.logprobs is not None:
            found |= Feature.LOGPROB | (Feature.TOP if self.logprobs else Feature(0))
        return found

    def edits(self) -> NDArray[np.int32]:
        """Return the edited tokens, int32 [3, edits]: ids, bits of the biases, positions where their bans end."""
        biases = dict(self.logit_bias)
        banned = set(self.banned_ids)
        ids = sorted(biases.keys() | banned)
        table = np.empty((3, len(ids)), dtype=np.int32)
        table[0] = ids
        table[1] = np.array([biases.get(token, 0.0) for token in ids], dtype=np.float32).view(np.int32)
        table[2] = [self.banned_until if token in banned else 0 for token in ids]
        return table

    def columns(self, row: int) -> NDArray[np.int32]:
        """Return the columns of a step's row, int32 [ROW_WIDTH], with position 0.

        Args:
            row: the sequence's row of the state that `Sampler.begin` writes.
        """
        columns = np.zeros(ROW_WIDTH, dtype=np.int32)
        floats = columns.view(np.float32)
        columns[Column.FLAGS] = self.features
        columns[Column.ROW] = row
        floats[Column.SCALE] = 1.0 if self.is_greedy else 1.0 / max(self.temperature, _LEAST_TEMPERATURE)
        columns[Column.TOP_K] = max(self.top_k, 0)
        floats[Column.TOP_P] = self.top_p
        floats[Column.MIN_P] = math.log(self.min_p) if self.min_p > 0 else -math.inf
        floats[Column.PRESENCE] = self.presence_penalty
        floats[Column.FREQUENCY] = self.frequency_penalty
        floats[Column.REPETITION] = self.repetition_penalty
        floats[Column.PARDON] = 1.0 / self.repetition_penalty
        columns[[Column.SEED_LOW, Column.SEED_HIGH]] = np.array([self.seed], dtype=np.int64).view(np.int32)
        edited = {token for token, _ in self.logit_bias} | set(self.banned_ids)
        columns[Column.EDITS] = len(edited)
        pieces = sum(1 << piece for piece in {min(token // PIECE, 63) for token in edited})
        columns[[Column.PIECES_LOW, Column.PIECES_HIGH]] = np.array([pieces], dtype=np.uint64).view(np.int32)
        return columns


def filler_columns(row: int) -> NDArray[np.int32]:
    """Return the columns of a row that asks for nothing. Its token is written to `row` of the state."""
    return SamplingValues().columns(row)
