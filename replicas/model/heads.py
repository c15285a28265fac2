"""Heads compute outputs from hidden states.

Letters: T tokens of the batch, B sequences, R selected rows, H hidden width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.sampling_row import Feature
from ranklet.kernels.stack import LinearStack
from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.dense import DenseLayers
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.pooling import Pooling
from ranklet.replicas.model.sampled import PromptScores, SampledToken
from ranklet.replicas.model.sampler import Sampler


class Head(Protocol):
    """Computes one output for each sequence. Hashable, because the key of a CUDA graph contains the step's heads."""

    @property
    def reads_last(self) -> bool:
        """Whether the head reads only each sequence's last token. The last layer may then compute no other token."""

    def results(self, arrays: Sequence[Tensor], count: int) -> Iterable[Any]:
        """Return the outputs of the first `count` sequences on the host; None for one that is not finite.

        Args:
            arrays: the outputs of the head, on the host.
        """


class PromptHead(Head, Protocol):
    """A head of whole prompts."""

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        """Select the states that the head reads: [T, H] -> [R, H]. Not called if only last tokens were computed."""

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        """Compute outputs [B, ...] on the device from the selected rows [R, H], to which the final norm was applied."""


@dataclass(frozen=True, eq=False)  # compared by identity, because each step compares the heads of its spans
class PoolingHead:
    """Pools the states of each sequence into a vector: float32 [B, H]."""

    pooling: Pooling
    rank: int = 0  # orders the heads of a step, so that equal sets of heads share a CUDA graph

    @property
    def reads_last(self) -> bool:
        return self.pooling.mode == "last"

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        return self.pooling.rows(states, spans)

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        return self.pooling.vectors(rows, spans)

    def results(self, arrays: Sequence[Tensor], count: int) -> Iterable[NDArray[np.float32] | None]:
        vectors = arrays[0].numpy()[:count]
        finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        return (vector if valid else None for vector, valid in zip(vectors, finite, strict=True))


class PoolingHeads:
    """The heads of embeddings: the base model's, and one for each other way to pool that adapters or requests need.

    The vectors of the others are normalized on the host, so that steps and CUDA graphs have few heads. So are those of
    models with Dense layers, which come before the normalization.

    Attributes:
        dense: layers of the base model.
        normalizes: whether vectors of the base model have length 1.
    """

    def __init__(self, base: Pooling, dense: DenseLayers | None = None) -> None:
        self.dense = dense or DenseLayers()
        self.normalizes = base.normalize
        base = replace(base, normalize=base.normalize and not self.dense)
        self.base = PoolingHead(base)
        ways = [("last", False), *((mode, skips) for mode in ("mean", "cls") for skips in (False, True))]
        self._plain = {
            way: PoolingHead(Pooling(way[0], normalize=False, skips=way[1]), rank) for rank, way in enumerate(ways, 1)
        }
        if not base.normalize:
            self._plain[base.mode, False] = self.base

    @property
    def last(self) -> PoolingHead:
        """The head that usually pools the last token."""
        return self.base if self.base.reads_last else self._plain["last", False]

    def choose(self, mode: str | None, *, normalize: bool, skips: bool) -> PoolingHead:
        """Return the head of a request. Its vectors have length 1, or are not normalized.

        Args:
            mode: None for that of the base model.
            normalize: whether the request needs vectors of length 1.
            skips: whether pooling leaves out first tokens.
        """
        base = self.base.pooling
        mode = mode or base.mode
        skips = skips and mode != "last"
        if mode == base.mode and not skips and (normalize or not base.normalize):
            return self.base
        return self._plain[mode, skips]


@dataclass(frozen=True, eq=False)
class ScoringHead:
    """Computes logprobs of the tokens of one prompt: [N], and the best alternatives to each, [N, 20]."""

    start: int  # index of the first token in the prompt

    reads_last = False

    def results(self, arrays: Sequence[Tensor], count: int) -> Iterable[PromptScores | None]:
        found = [array.numpy() for array in arrays]
        return [PromptScores(self.start, *found) if np.isfinite(found[0]).all() else None]


@dataclass(frozen=True, eq=False)
class TextHead:
    """Draws the next token of each sequence.

    The outputs are the token ids, int32 [B]; then, if a sequence of the step asked, the tokens' logprobs, float32 [B];
    then the ids and logprobs of the 20 best tokens, [B, 20] each.
    """

    lm_head: LmHead
    sampler: Sampler

    reads_last = True

    def draw(
        self, rows: Tensor, lora: LoraBatch | None, stack: LinearStack | None, columns: Tensor, features: Feature,
        last_token: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute the logits of rows [B, H], to which the final norm was applied, and draw a token from each.

        Args:
            columns: int32 [B, columns]: sampling values of each row.
            last_token: int32 [R + 1], to which the tokens are written too.
        """
        logits = self.lm_head.logits(rows, stack, lora)
        sampled = self.sampler.sample(logits, columns, features, last_token)
        return tuple(array for array in sampled if array is not None)

    def results(self, arrays: Sequence[Tensor], count: int) -> Iterable[int | SampledToken | None]:
        tokens = arrays[0][:count].tolist()
        if len(arrays) == 1:
            return [token if token >= 0 else None for token in tokens]
        return self._with_logprobs(tokens, arrays)

    @staticmethod
    def _with_logprobs(tokens: list[int], arrays: Sequence[Tensor]) -> Iterator[SampledToken | None]:
        logprobs = arrays[1].tolist()
        tops = [array.numpy() for array in arrays[2:]]
        for i, token in enumerate(tokens):
            top = tuple(array[i] for array in tops)
            yield SampledToken(token, logprobs[i], *top) if token >= 0 else None
