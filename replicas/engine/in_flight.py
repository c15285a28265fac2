"""A step between its launch and the delivery of its outputs."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.launched import LaunchedStep
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.result_thread import ResultThread
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.stats import BatchRecord, CacheRoom
from ranklet.replicas.errors import InternalError, InvalidAdapter, RankletError

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class InFlightStep:
    """A launched step.

    Attributes:
        bound: texts with a grammar that go on. Set by `deliver`.
    """

    plan: StepPlan
    launched: LaunchedStep
    bound: list[Sequence] = field(default_factory=list)
    _pieces: list[tuple[Sequence, Any]] = field(default_factory=list)  # of texts, one token each
    _complete: list[Sequence] = field(default_factory=list)  # one of each request whose sequences are all done
    _failures: list[Callable[[], None]] = field(default_factory=list)

    def deliver(self, began_s: float, compute_s: float) -> list[Sequence]:
        """Give each sequence its output. An invalid output fails only its own request. Valid after the step's `wait`.

        Args:
            began_s: when the device began the step.

        Returns:
            The sequences that are done.
        """
        done: list[Sequence] = []
        members, pieces = list(self.plan.members()), self._pieces
        for group in self.launched.groups:
            for index, output in group.results():
                sequence, epoch = members[index]
                if sequence.epoch != epoch:
                    continue  # preempted, failed or ended since the step was planned
                try:
                    if output is None:
                        raise _not_finite(sequence.adapter)
                    piece, is_done = sequence.request.on_output(sequence, output, began_s, compute_s)
                except Exception as error:
                    self._failures.append(partial(sequence.request.fail, _told(error)))
                    done.append(sequence)
                    continue
                if piece is not None:
                    pieces.append((sequence, piece))
                    if sequence.grammar is not None and not is_done:
                        self.bound.append(sequence)
                if is_done:
                    done.append(sequence)
                    if sequence.request.is_complete:
                        self._complete.append(sequence)
        return done

    def send(self, results: ResultThread) -> None:
        """Pass what was delivered to the sinks. Called without the engine's lock.

        Args:
            results: ends the requests that are slow.
        """
        for sequence, piece in self._pieces:
            sequence.request.send(sequence.index, piece)
        for fail in self._failures:
            fail()
        for sequence in self._complete:
            end = partial(sequence.request.end, self.launched.backend)
            if sequence.request.is_slow:
                results.add(sequence.flow, end)
            else:
                end()

    def record(self, began_s: float, compute_s: float, room: CacheRoom | None) -> BatchRecord:
        """Describe the step. Called after `deliver`; only sequences without earlier outputs waited in the queue."""
        sequences: dict[str, int] = {}
        tokens: dict[str, int] = {}
        waits = []
        for part in self.plan.parts:
            sequence = part.sequence
            adapter = sequence.flow.adapter
            tokens[adapter] = tokens.get(adapter, 0) + part.tokens
            if sequence.passes <= 1 and part.head is not None:
                sequences[adapter] = sequences.get(adapter, 0) + 1
                waits.append(max(0.0, began_s - sequence.arrived_s))
        generated = Counter([sequence.flow.adapter for sequence, _ in self._pieces])
        return BatchRecord(sequences, tokens, self.launched.backend, waits, compute_s, dict(generated), room)


def _told(error: Exception) -> RankletError:
    """Return the error for the client. Any error of a task is caught: this thread answers all requests."""
    if isinstance(error, RankletError):
        return error
    logger.error("a task failed", exc_info=error)
    return InternalError(f"the engine failed on this output: {type(error).__name__}: {error}")


def _not_finite(adapter: AdapterRef | None) -> RankletError:
    if adapter is None:
        return InternalError("the output for this prompt is not finite, without an adapter")
    reason = "the adapter's weights overflow, or its head has no row of a token"
    return InvalidAdapter(adapter.name, [f"the output for this prompt is not finite: {reason}"])
