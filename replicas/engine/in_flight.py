"""A batch between launch and answer."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.request import Prompt
from ranklet.replicas.engine.runner import Running
from ranklet.replicas.engine.stats import BatchRecord
from ranklet.replicas.errors import InternalError


@dataclass(slots=True, eq=False)
class InFlightBatch:
    """Prompts and the batch they run in."""

    prompts: list[Prompt]
    running: Running

    @property
    def tokens(self) -> int:
        return sum(len(work.tokens) for work in self.prompts)

    def answer(self, vectors: NDArray[np.float32], began_s: float, compute_s: float) -> None:
        """Hand each prompt its vector; one that is not finite fails its own request alone.

        Args:
            vectors: [prompts, hidden].
            began_s: when the device began with the batch.
        """
        backend = self.running.backend
        finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        for work, vector, sound in zip(self.prompts, vectors, finite, strict=True):
            if sound:
                waited_s = max(0.0, began_s - work.arrived_s)
                work.call.complete(work.index, vector, backend=backend, queue_s=waited_s, compute_s=compute_s)
            else:
                work.call.fail(InternalError("the answer to this prompt is not finite; the adapter may overflow"))

    def record(self, began_s: float, compute_s: float) -> BatchRecord:
        """What statistics say of it."""
        requests: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for work in self.prompts:
            requests[work.flow] = requests.get(work.flow, 0) + 1
            tokens[work.flow] = tokens.get(work.flow, 0) + len(work.tokens)
        waits = [max(0.0, began_s - work.arrived_s) for work in self.prompts]
        return BatchRecord(requests, tokens, self.running.backend, waits, compute_s)


def adapters_of(prompts: Iterable[Prompt]) -> list[AdapterRef | None]:
    """Each prompt's adapter, None for the base."""
    return [work.adapter for work in prompts]


def names_of(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """The adapters' names, each once."""
    return tuple(sorted({work.adapter.name for work in prompts if work.adapter is not None}))


def requests_of(prompts: Iterable[Prompt]) -> int:
    """How many requests the prompts belong to."""
    return len({id(work.call) for work in prompts})
