"""Drawn tokens on the host. Imports no torch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenLogprob(NamedTuple):
    """A token's logprob and the best alternatives, best first. Raw: before temperature, penalties and masks."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptScores(NamedTuple):
    """Logprobs of consecutive tokens of a prompt, each given the tokens before it.

    Attributes:
        start: index of the first token.
        logprobs: float32 [tokens].
        top_ids: int32 [tokens, 20], best first; None if they were not asked for.
        top_logprobs: float32 [tokens, 20].
    """

    start: int
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None

    def of(self, token: int, count: int) -> TokenLogprob:
        """Return the logprob of the token with this index, and the `count` best alternatives."""
        at = token - self.start
        tops = (None, None) if self.top_ids is None or self.top_logprobs is None else (
            self.top_ids[at], self.top_logprobs[at])  # fmt: skip
        return SampledToken(token, float(self.logprobs[at]), *tops).best(count)


class SampledToken(NamedTuple):
    """A drawn token of a step in which some sequence asked for logprobs.

    Attributes:
        top_ids: int32 [20], best first; None if no sequence of the step asked.
        top_logprobs: float32 [20].
    """

    token: int
    logprob: float
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None

    def best(self, count: int) -> TokenLogprob:
        """Return the token's logprob with the `count` best alternatives."""
        if not count or self.top_ids is None or self.top_logprobs is None:
            return TokenLogprob(self.logprob)
        ids, values = self.top_ids[:count].tolist(), self.top_logprobs[:count].tolist()
        return TokenLogprob(self.logprob, tuple(zip(ids, values, strict=True)))
