"""A step between its launch and the delivery of its outputs."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.request import Notice
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.stats import BatchRecord
from ranklet.replicas.errors import InternalError

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class InFlightStep:
    plan: StepPlan
    launched: LaunchedStep
    generated: Counter[str] = field(default_factory=Counter)  # delivered tokens by flow

    def deliver(self, began_s: float, compute_s: float, notices: list[Notice]) -> list[Sequence]:
        """Give each sequence its output. An invalid output fails only its own request. Valid after the step's `wait`.

        Args:
            began_s: when the device began the step.
            notices: calls to make afterwards, without a lock.

        Returns:
            The sequences that are done.
        """
        done: list[Sequence] = []
        members, backend = list(self.plan.members()), self.launched.backend
        for group in self.launched.groups:
            for index, output in group.results():
                sequence, epoch = members[index]
                if sequence.epoch != epoch:
                    continue  # preempted, failed or ended since the step was planned
                request, length = sequence.request, len(sequence.ids)
                if output is None:
                    error = InternalError("the output for this prompt is not finite; the adapter may overflow")
                    notices.append(partial(request.fail, error))
                    done.append(sequence)
                    continue
                try:
                    if request.on_output(
                        sequence, output, notices, backend=backend, began_s=began_s, compute_s=compute_s
                    ):
                        done.append(sequence)
                except Exception as error:  # a defect of a task must not end the thread that answers every request
                    logger.exception("a task failed")
                    failure = InternalError(f"the engine failed on this output: {type(error).__name__}: {error}")
                    notices.append(partial(request.fail, failure))
                    done.append(sequence)
                if len(sequence.ids) > length:
                    self.generated[sequence.flow] += len(sequence.ids) - length
        return done

    def record(self, began_s: float, compute_s: float) -> BatchRecord:
        """Describe the step. Called after `deliver`; only sequences without earlier outputs waited in the queue."""
        sequences: dict[str, int] = {}
        tokens: dict[str, int] = {}
        waits = []
        for part in self.plan.parts:
            sequence = part.sequence
            flow = sequence.flow
            tokens[flow] = tokens.get(flow, 0) + part.tokens
            if sequence.passes <= 1 and part.head is not None:
                sequences[flow] = sequences.get(flow, 0) + 1
                waits.append(max(0.0, began_s - sequence.arrived_s))
        return BatchRecord(sequences, tokens, self.launched.backend, waits, compute_s, dict(self.generated))
