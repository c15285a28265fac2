"""A batch between launch and answer."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.call import Prompt
from ranklet.replicas.errors import InternalError
from ranklet.replicas.reference import AdapterRef
from ranklet.replicas.stats import BatchRecord
from ranklet.replicas.step import Running


@dataclass(slots=True, eq=False)
class Flight:
    """Prompts and the batch they run in."""

    prompts: list[Prompt]
    running: Running

    def answer(self, vectors: NDArray[np.float32], compute_s: float) -> None:
        """Hand each prompt its vector; one that is not finite fails its own request alone.

        Args:
            vectors: [prompts, hidden].
        """
        running = self.running
        for work, vector in zip(self.prompts, vectors, strict=True):
            if np.isfinite(vector).all():
                waited_s = running.launched_s - work.arrived_s
                work.call.complete(
                    work.index, vector, backend=running.backend, queue_s=waited_s, compute_s=compute_s
                )  # fmt: skip
            else:
                work.call.fail(InternalError("the answer to this prompt is not finite; the adapter may overflow"))

    def record(self, compute_s: float) -> BatchRecord:
        """What statistics say of it."""
        requests: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for work in self.prompts:
            name = work.adapter.name if work.adapter else ""
            requests[name] = requests.get(name, 0) + 1
            tokens[name] = tokens.get(name, 0) + len(work.tokens)
        waits = [self.running.launched_s - work.arrived_s for work in self.prompts]
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
