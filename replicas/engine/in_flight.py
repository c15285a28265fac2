"""A step between its launch and the delivery of its outputs."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ranklet.replicas.engine.plan import Part
from ranklet.replicas.engine.runner import LaunchedStep
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.stats import BatchRecord
from ranklet.replicas.errors import InternalError

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class InFlightStep:
    """The parts of a step and the step on the device."""

    parts: list[Part]
    launched: LaunchedStep

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def deliver(self, outputs: list[NDArray[Any]], began_s: float, compute_s: float) -> list[Sequence]:
        """Give each sequence its output. An invalid output fails only its own request.

        Args:
            outputs: of each head of the step, [parts, ...].
            began_s: when the device began the step.

        Returns:
            Sequences that need another pass.
        """
        heads, backend, again = self.launched.heads, self.launched.backend, []
        valid = [head.are_valid(output) for head, output in zip(heads, outputs, strict=True)]
        for i, part in enumerate(self.parts):
            sequence, at = part.sequence, 0 if len(heads) == 1 else heads.index(part.head)
            request = sequence.request
            if not valid[at][i]:
                request.fail(InternalError("the output for this prompt is not finite; the adapter may overflow"))
                continue
            try:
                if request.on_output(sequence, outputs[at][i], backend=backend, began_s=began_s, compute_s=compute_s):
                    again.append(sequence)
            except Exception as error:  # a defect of a task must not end the thread that answers every request
                logger.exception("a task failed")
                request.fail(InternalError(f"the engine failed on this output: {type(error).__name__}: {error}"))
        return again

    def record(self, began_s: float, compute_s: float) -> BatchRecord:
        sequences: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for part in self.parts:
            flow = part.sequence.flow
            sequences[flow] = sequences.get(flow, 0) + 1
            tokens[flow] = tokens.get(flow, 0) + part.tokens
        waits = [max(0.0, began_s - part.sequence.arrived_s) for part in self.parts]
        return BatchRecord(sequences, tokens, self.launched.backend, waits, compute_s)


def names_of(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Return the names of the sequences' adapters, sorted."""
    return tuple(sorted({sequence.adapter.name for sequence in sequences if sequence.adapter is not None}))


def requests_of(sequences: Iterable[Sequence]) -> int:
    """Return the number of requests that the sequences belong to."""
    return len({id(sequence.request) for sequence in sequences})
