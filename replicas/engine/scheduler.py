"""Which waiting prompts make the next batch, and which adapters they need. Pure: no clock, no locks, no tensors.

The queue is oldest first, but for adapters that have more than their share (`fair_queue.py`). A prompt whose
adapter is not resident is passed by until it is; a prompt that is ready but does not fit beside earlier ones is passed
by at most `PATIENCE` times, then no later one may enter before it. So:

- the first ready prompt is always in the next batch;
- a ready prompt is overtaken in at most `PATIENCE` batches;
- slots go to the adapters of the first prompts: with S slots, the first S distinct adapters in the queue are
  loaded and kept, so a prompt's adapter is on its way once fewer than S others have earlier prompts waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue, W

PATIENCE = 4
_REMEMBERED = 8
_LOOKAHEAD = 512  # prompts looked at beyond a full batch, for adapters to load early


@dataclass(slots=True)
class StepPlan(Generic[W]):
    """A proposal for the next batch; nothing has changed until `Scheduler.commit`."""

    batch: list[W] = field(default_factory=list)
    passed: list[W] = field(default_factory=list)  # ready, but not in this batch
    cancelled: list[W] = field(default_factory=list)
    demand: list[AdapterRef] = field(default_factory=list)  # adapters of waiting prompts, oldest first
    tokens: int = 0


class Scheduler(Generic[W]):
    """Plans the batches of one engine from its queue."""

    def __init__(self, *, max_tokens: int, max_requests: int, max_adapters: int, max_demand: int) -> None:
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._max_adapters = max_adapters
        self._max_demand = max_demand
        self._others = 0  # batches for which it is remembered that there are others beside a flood
        self.queue: FairQueue[W] = FairQueue(max_tokens)

    def propose(
        self, usable: Callable[[AdapterRef], bool], enough: int | None = None, beside: int | None = None
    ) -> StepPlan[W]:
        """The next batch, given which adapters are ready in a slot; closed when it has `enough` tokens.

        When more waits than fits it goes on to the limit. Adapters that flood the queue do not count for that if there
        are others of late, and do not fill a batch beyond `beside` tokens: the others shall not wait for a large one.
        """
        backlog = self.queue.tokens > self._max_tokens
        if backlog and self._others:
            backlog = self.queue.tokens_within() > self._max_tokens
        most = self._max_tokens if backlog or enough is None else min(enough, self._max_tokens)
        found: StepPlan[W] = StepPlan()
        adapters: set[AdapterRef] = set()
        demand: dict[AdapterRef, bool] = {}
        full, beyond, others = False, 0, self._others > 0
        for work in self.queue:
            if work.cancelled:
                found.cancelled.append(work)
                continue
            ready = work.adapter is None or self._ready(work.adapter, demand, usable)
            full = full or (others and found.tokens >= (beside or most) and self.queue.floods(work))
            if full:
                beyond += 1
                if beyond > _LOOKAHEAD:
                    break
            elif ready and self._fits(work, found, adapters):
                found.batch.append(work)
                found.tokens += len(work.tokens)
                others = others or not self.queue.floods(work)
                if work.adapter is not None:
                    adapters.add(work.adapter)
                full = work.solo or len(found.batch) == self._max_requests or found.tokens >= most
            elif ready:
                found.passed.append(work)
                full = work.passed_over >= PATIENCE
        found.demand = list(demand)[: self._max_demand]
        return found

    def _ready(self, adapter: AdapterRef, demand: dict[AdapterRef, bool], usable: Callable[[AdapterRef], bool]) -> bool:
        if adapter not in demand:
            demand[adapter] = usable(adapter)
        return demand[adapter]

    def _fits(self, work: W, found: StepPlan[W], adapters: set[AdapterRef]) -> bool:
        if not found.batch:
            return True
        if work.solo or found.tokens + len(work.tokens) > self._max_tokens:
            return False
        return work.adapter is None or work.adapter in adapters or len(adapters) < self._max_adapters

    def commit(self, proposal: StepPlan[W]) -> None:
        """Take a proposed batch, and the cancelled prompts, out of the queue."""
        others = any(not self.queue.floods(work) for work in proposal.batch)
        self._others = _REMEMBERED if others else max(0, self._others - 1)
        self.queue.remove(proposal.cancelled)
        self.queue.served(proposal.batch)
        for work in proposal.passed:
            work.passed_over += 1
