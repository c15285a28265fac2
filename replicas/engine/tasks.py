"""Tasks: the passes that a request needs and the content of its answer.

The engine runs a sequence in a loop. `Task.need` returns the next pass: how many tokens it computes, and with which
head. `Head.finish` computes the output from the hidden states on the device. `Task.accept` takes the output and returns
`Delta` if another pass follows, or `Done`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.plan import Need
from ranklet.replicas.engine.sequence import Sequence

if TYPE_CHECKING:
    from ranklet.replicas.model.heads import Head


@dataclass(frozen=True, slots=True)
class Delta:
    """The sequence needs another pass."""

    piece: Any = None  # sent to the client now; None sends nothing


@dataclass(frozen=True, slots=True)
class Done:
    """The sequence needs no further pass."""


class Task(Protocol):
    """Work of one request. Collects the outputs of its sequences."""

    def need(self, sequence: Sequence) -> Need:
        """Return the next pass. Depends only on the sequence's `ids` and `computed`."""

    def accept(self, sequence: Sequence, output: NDArray[Any]) -> Delta | Done:
        """Take the output of a pass, a row of the head's outputs. Called on the answer thread.

        After `Delta` the engine adds the tokens of the pass to `sequence.computed` and calls `need`.
        """

    def result(self) -> Any:
        """Return the content of the answer. Called once, after all sequences are done."""


class EmbedTask:
    """Computes each prompt in one pass. The result is the pooled vectors, float32 [prompts, dimensions].

    Args:
        prompts: number of prompts.
        normalize: normalize shortened vectors again, for a head whose vectors have length 1.

    Raises:
        InvalidRequest: `dimensions` is out of range.
    """

    def __init__(
        self, params: EmbedParams, prompts: int, limits: RequestLimits, head: "Head", *, normalize: bool
    ) -> None:
        width = limits.check_dimensions(params.dimensions)
        self._head = head
        self._renormalize = normalize and width < limits.hidden
        self._vectors = np.full((prompts, width), np.nan, dtype=np.float32)

    def need(self, sequence: Sequence) -> Need:
        return Need(len(sequence.ids), self._head, is_final=True)

    def accept(self, sequence: Sequence, output: NDArray[Any]) -> Delta | Done:
        vector = output[: self._vectors.shape[1]]
        if self._renormalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        self._vectors[sequence.index] = vector
        return _DONE

    def result(self) -> NDArray[np.float32]:
        return self._vectors


_DONE = Done()
