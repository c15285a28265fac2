"""Which waiting prompts make the next batch, and which adapters they need. Pure: no clock, no locks, no tensors.

The rule is oldest first. A prompt whose adapter is not resident is passed by until it is; a prompt that is ready but
does not fit beside older ones is passed by at most `PATIENCE` times, then nothing younger may enter before it. So:

- the oldest ready prompt is always in the next batch;
- a ready prompt is overtaken in at most `PATIENCE` batches;
- slots go to the adapters of the oldest prompts: with S slots, the first S distinct adapters in arrival order are
  loaded and kept, so a prompt's adapter is on its way once fewer than S others have older prompts waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.reference import AdapterRef

PATIENCE = 4
_LOOKAHEAD = 512  # prompts looked at beyond a full batch, for adapters to load early


@dataclass(slots=True, eq=False)
class Work:
    """One prompt on its way to the device."""

    tokens: NDArray[np.int32]  # [length]
    adapter: AdapterRef | None
    arrived_s: float
    passed_over: int = 0
    solo: bool = False  # must run alone: it was in a batch that failed
    cancelled: bool = False


W = TypeVar("W", bound=Work)


@dataclass(slots=True)
class Round(Generic[W]):
    """A proposal for the next batch; nothing has changed until `Scheduler.commit`."""

    batch: list[W] = field(default_factory=list)
    passed: list[W] = field(default_factory=list)  # ready, but not in this batch
    cancelled: list[W] = field(default_factory=list)
    demand: list[AdapterRef] = field(default_factory=list)  # adapters of waiting prompts, oldest first
    tokens: int = 0


class Scheduler(Generic[W]):
    """The queue of one engine."""

    def __init__(self, *, max_tokens: int, max_requests: int, max_adapters: int, max_demand: int) -> None:
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._max_adapters = max_adapters
        self._max_demand = max_demand
        self._waiting: dict[W, None] = {}  # in arrival order
        self.waiting_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: W) -> None:
        """Put a prompt at the end of the queue."""
        self._waiting[work] = None
        self.waiting_tokens += len(work.tokens)

    def put_back(self, works: list[W]) -> None:
        """Put prompts of a failed batch at the front, in this order."""
        self._waiting = dict.fromkeys(works) | self._waiting
        self.waiting_tokens += sum(len(work.tokens) for work in works)

    def remove(self, works: list[W]) -> None:
        """Take prompts out of the queue."""
        for work in works:
            del self._waiting[work]
            self.waiting_tokens -= len(work.tokens)

    def waiting(self) -> list[W]:
        """The queue, oldest first."""
        return list(self._waiting)

    def propose(self, usable: Callable[[AdapterRef], bool], enough: int | None = None) -> Round[W]:
        """The next batch, given which adapters are ready in a slot; closed when it has `enough` tokens."""
        most = min(enough or self._max_tokens, self._max_tokens)
        found: Round[W] = Round()
        adapters: set[AdapterRef] = set()
        demand: dict[AdapterRef, bool] = {}
        full, beyond = False, 0
        for work in self._waiting:
            if work.cancelled:
                found.cancelled.append(work)
                continue
            ready = work.adapter is None or self._ready(work.adapter, demand, usable)
            if full:
                beyond += 1
                if beyond > _LOOKAHEAD:
                    break
            elif ready and self._fits(work, found, adapters):
                found.batch.append(work)
                found.tokens += len(work.tokens)
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

    def _fits(self, work: W, found: Round[W], adapters: set[AdapterRef]) -> bool:
        if not found.batch:
            return True
        if work.solo or found.tokens + len(work.tokens) > self._max_tokens:
            return False
        return work.adapter is None or work.adapter in adapters or len(adapters) < self._max_adapters

    def commit(self, proposal: Round[W]) -> None:
        """Take a proposed batch, and the cancelled prompts, out of the queue."""
        self.remove(proposal.batch)
        self.remove(proposal.cancelled)
        for work in proposal.passed:
            work.passed_over += 1
