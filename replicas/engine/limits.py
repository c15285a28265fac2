"""What a request may ask of an engine, checked before anything is queued."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.errors import InvalidRequest

MIN_DIMENSIONS = 32


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds of one engine's requests."""

    max_model_len: int
    hidden: int
    vocab: int

    def check(self, prompts: Sequence[NDArray[np.int32]], dimensions: int | None) -> int:
        """The width of the vectors that the request will get.

        Raises:
            InvalidRequest: a prompt is empty or too long, a token id or `dimensions` is out of range.
        """
        least = min(MIN_DIMENSIONS, self.hidden)
        if dimensions is not None and not least <= dimensions <= self.hidden:
            raise InvalidRequest(f"dimensions: expected {least} to {self.hidden}, got {dimensions}", param="dimensions")
        if not prompts:
            raise InvalidRequest("input: expected at least one prompt, got none", param="input")
        for index, prompt in enumerate(prompts):
            self._check_prompt(index, prompt)
        return dimensions or self.hidden

    def _check_prompt(self, index: int, prompt: NDArray[np.int32]) -> None:
        if not 1 <= len(prompt) <= self.max_model_len:
            raise InvalidRequest(
                f"input[{index}]: expected 1 to {self.max_model_len} tokens, got {len(prompt)}; "
                "shorten the text or split it",
                param="input",
            )
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= self.vocab:
            wrong = low if low < 0 else high
            raise InvalidRequest(
                f"input[{index}]: expected token ids from 0 to {self.vocab - 1}, got {wrong}", param="input"
            )
