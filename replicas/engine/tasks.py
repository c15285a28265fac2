"""Tasks: how a request uses the device, pass by pass, and what its answer holds.

The engine knows three verbs. `Task.need` says which tokens the next pass of a sequence computes and with which head,
`Head.finish` makes outputs of their hidden states on the device, and `Task.accept` takes an output and returns whether
the sequence is done or needs another pass.
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
    """An output that leaves before its sequence is done; None if nothing leaves yet."""

    piece: Any = None


@dataclass(frozen=True, slots=True)
class Done:
    """A sequence needs no further pass."""


class Task(Protocol):
    """The work of one request. One object a request: it gathers the outputs."""

    def need(self, sequence: Sequence) -> Need:
        """Return the next pass of a sequence."""

    def accept(self, sequence: Sequence, output: NDArray[Any]) -> Delta | Done:
        """Take the output of a pass, a row of what the head returned. Called on the answer thread."""

    def result(self) -> Any:
        """Return the answer's content; called once, when all sequences are done."""


class EmbedTask:
    """One pass over each prompt; the pooled vectors are the result: float32 [prompts, dimensions].

    Args:
        prompts: number of prompts.
        normalize: whether the head's vectors have length 1; shortened ones are then normalized again.

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
