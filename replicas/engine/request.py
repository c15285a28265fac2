"""One request to an engine: its prompts, gathered again from whichever batches they ran in."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.engine.fair_queue import Sequence
from ranklet.replicas.errors import RankletError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The vectors of one request, in the order of its prompts. Times in seconds."""

    vectors: NDArray[np.float32]  # [prompts, dimensions]
    tier: str | None  # where the adapter was when the request arrived: gpu, host, disk; None for the base
    backend: str
    prompt_tokens: int
    queue_s: float  # the longest wait of any prompt
    compute_s: float  # the longest batch of any prompt


@dataclass(slots=True, eq=False)
class Prompt(Sequence):
    """A prompt that knows its request and its place in it."""

    call: "Request" = field(kw_only=True)
    index: int = field(kw_only=True)


class Request:
    """Gathers the vectors of one request; `done` is called once, when the last is there or the first failed."""

    def __init__(
        self, prompts: int, dimensions: int, *, shortened: bool, tier: str | None, tokens: int,
        done: Callable[[Answer | RankletError], None],
    ) -> None:  # fmt: skip
        self.works: list[Prompt] = []
        self._vectors = np.full((prompts, dimensions), np.nan, dtype=np.float32)
        self._shortened = shortened
        self._tier = tier
        self._tokens = tokens
        self._left = prompts
        self._done: Callable[[Answer | RankletError], None] | None = done
        self._backend = "none"
        self._queue_s = self._compute_s = 0.0

    def complete(
        self, index: int, vector: NDArray[np.float32], *, backend: str, queue_s: float, compute_s: float
    ) -> None:
        """One prompt's vector is there, of the model's full width."""
        vector = vector[: self._vectors.shape[1]]
        if self._shortened:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        self._vectors[index] = vector
        self._backend = backend
        self._queue_s = max(self._queue_s, queue_s)
        self._compute_s = max(self._compute_s, compute_s)
        self._left -= 1
        if self._left == 0:
            self._finish(Answer(self._vectors, self._tier, self._backend, self._tokens, self._queue_s, self._compute_s))

    def fail(self, error: RankletError) -> None:
        """The request cannot be answered; its other prompts are dropped."""
        self.cancel()
        self._finish(error)

    def cancel(self) -> None:
        """Drop what has not reached the device."""
        for work in self.works:
            work.cancelled = True

    def _finish(self, result: Answer | RankletError) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        try:
            done(result)
        except Exception:  # the caller's defect must not end the thread that answers everyone
            logger.exception("the callback of a request failed")

    @property
    def open(self) -> bool:
        """Whether nobody has been answered yet."""
        return self._done is not None


@dataclass(frozen=True, slots=True)
class Ticket:
    """The caller's hold on a submitted request."""

    call: Request

    def cancel(self) -> None:
        """Drop the prompts that have not reached the device; the answer may then never come."""
        self.call.cancel()
