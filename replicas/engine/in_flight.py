"""A step between its launch and the delivery of its outputs."""

import logging
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
    parts: list[Part]
    launched: LaunchedStep

    def deliver(self, outputs: list[NDArray[Any]], began_s: float, compute_s: float) -> list[Sequence]:
        """Give each sequence its output. An invalid output fails only its own request.

        Args:
            outputs: each head's outputs [parts, ...].
            began_s: when the device began the step.

        Returns:
            The sequences that need another pass.
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
        """Describe the step. Called after `deliver`; only first passes have waited in the queue."""
        sequences: dict[str, int] = {}
        tokens: dict[str, int] = {}
        waits = []
        for part in self.parts:
            sequence = part.sequence
            flow = sequence.flow
            sequences[flow] = sequences.get(flow, 0) + 1
            tokens[flow] = tokens.get(flow, 0) + part.tokens
            if sequence.passes <= 1:
                waits.append(max(0.0, began_s - sequence.arrived_s))
        return BatchRecord(sequences, tokens, self.launched.backend, waits, compute_s)
