"""Chooses the sequences of the next step and the adapters to load. No clock, no locks, no tensors.

Started sequences, which need another pass, come first. Queued sequences follow in the queue's order (`fair_queue.py`).
A sequence is passed over while its adapter is in no slot. A sequence whose adapter is in a slot, but that does not fit
into a step, is passed over at most `PATIENCE` times; then no later sequence enters a step before it. Therefore:

- the first ready sequence of the queue is in the next step that has space beside the started ones;
- a ready sequence is overtaken in at most `PATIENCE` steps;
- with S slots, the first S distinct adapters of the queue are loaded and kept.
"""

from collections.abc import Callable, Iterable

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.request import Request
from ranklet.replicas.engine.sequence import Sequence

PATIENCE = 4
_REMEMBERED_STEPS = 8  # after a step with an adapter within its allowance, more requests of such adapters are expected
_LOOKAHEAD = 512  # sequences examined after a step is full, so that their adapters are loaded early


class Scheduler:
    """Plans the steps of one engine.

    Args:
        max_adapters: number of adapters that a step may mix.
        max_demand: number of adapters in `StepPlan.demand`.
    """

    def __init__(self, *, max_tokens: int, max_sequences: int, max_adapters: int, max_demand: int) -> None:
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._max_adapters = max_adapters
        self._max_demand = max_demand
        self._steps_beside_others = 0  # further steps in which adapters within their allowance may have requests
        self._started: list[Sequence] = []  # sequences that need another pass; they hold their slots
        self.queue = FairQueue(max_tokens)

    def propose(
        self, is_ready: Callable[[AdapterRef], bool], enough: int | None = None, beside: int | None = None
    ) -> StepPlan:
        """Return the next step. Changes nothing.

        Args:
            is_ready: whether an adapter is in a slot.
            enough: step size above which steps are not faster per token. A step takes no more sequences at this size,
                unless more tokens wait than fit into the largest step.
            beside: step size up to which flooding adapters fill a step while other adapters have requests, so that
                these need not wait for a large step.
        """
        most = self._target_tokens(enough)
        plan = StepPlan()
        adapters: set[AdapterRef] = set()
        ready: dict[AdapterRef, bool] = {}
        beyond, others = 0, self._steps_beside_others > 0
        for sequence in self._started:
            self._add_started(sequence, plan, adapters)
        full = len(plan.parts) == self._max_sequences or plan.tokens >= most
        for sequence in self.queue:
            if sequence.cancelled:
                plan.cancelled.append(sequence)
                continue
            adapter = sequence.adapter
            if adapter is not None and adapter not in ready:
                ready[adapter] = is_ready(adapter)
            full = full or (others and plan.tokens >= (beside or most) and self.queue.floods(sequence))
            if full:
                beyond += 1
                if beyond > _LOOKAHEAD:
                    break
            elif adapter is None or ready[adapter]:
                if not self._fits(sequence, plan, adapters):
                    plan.passed.append(sequence)
                    full = sequence.passed_over >= PATIENCE
                    continue
                self._add(sequence, plan, adapters)
                others = others or not self.queue.floods(sequence)
                full = sequence.solo or len(plan.parts) == self._max_sequences or plan.tokens >= most
        plan.demand = list(ready)[: self._max_demand]
        return plan

    def _target_tokens(self, enough: int | None) -> int:
        backlog = self.queue.tokens > self._max_tokens
        if backlog and self._steps_beside_others:
            backlog = self.queue.tokens_within() > self._max_tokens
        return self._max_tokens if backlog or enough is None else min(enough, self._max_tokens)

    def _add_started(self, sequence: Sequence, plan: StepPlan, adapters: set[AdapterRef]) -> None:
        if sequence.cancelled:
            plan.cancelled.append(sequence)
        elif len(plan.parts) < self._max_sequences and self._fits(sequence, plan, adapters):
            self._add(sequence, plan, adapters)

    def _add(self, sequence: Sequence, plan: StepPlan, adapters: set[AdapterRef]) -> None:
        plan.add(sequence)
        if sequence.adapter is not None:
            adapters.add(sequence.adapter)

    def _fits(self, sequence: Sequence, plan: StepPlan, adapters: set[AdapterRef]) -> bool:
        if not plan.parts:
            return True
        if sequence.solo or plan.parts[0].sequence.solo or plan.tokens + sequence.need.tokens > self._max_tokens:
            return False
        return sequence.adapter is None or sequence.adapter in adapters or len(adapters) < self._max_adapters

    def commit(self, plan: StepPlan) -> None:
        """Remove the plan's sequences, and the cancelled ones, from the waiting sequences."""
        sequences = plan.sequences
        others = any(not self.queue.floods(sequence) for sequence in sequences)
        self._steps_beside_others = _REMEMBERED_STEPS if others else max(0, self._steps_beside_others - 1)
        self.drop([*plan.cancelled, *sequences])
        self.queue.charge(plan.tokens)
        for sequence in plan.passed:
            sequence.passed_over += 1

    def drop(self, sequences: Iterable[Sequence]) -> None:
        leaving = list(sequences)
        if self._started:
            ids, started = {id(each) for each in leaving}, {id(each) for each in self._started}
            self._started = [each for each in self._started if id(each) not in ids]
            leaving = [each for each in leaving if id(each) not in started]
        self.queue.remove(leaving)

    def take_waiting(self, adapter: AdapterRef) -> list[Request]:
        """Remove the queued sequences of an adapter. Returns their requests."""
        lost = [sequence for sequence in self.queue if sequence.adapter == adapter]
        self.queue.remove(lost)
        return list(dict.fromkeys(sequence.request for sequence in lost))

    def resume(self, sequences: Iterable[Sequence]) -> None:
        self._started += sequences

    def waiting(self) -> list[Sequence]:
        """Return the sequences that are in no step, queued or started."""
        return [*self.queue, *self._started]

    def has_waiting(self) -> bool:
        return len(self.queue) > 0 or bool(self._started)
