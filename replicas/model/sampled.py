"""Drawn tokens on the host. Imports no torch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenLogprob(NamedTuple):
    """A token's logprob and the best alternatives, best first. Raw: before temperature, penalties and masks."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
