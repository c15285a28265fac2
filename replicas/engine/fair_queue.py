"""The prompts that wait for one engine, in an order in which no adapter can crowd the others out.

The order is that of arrival, as long as no adapter has more than an allowance of tokens waiting. What an adapter has
beyond that stands back: it is ordered as if served in turn with the others, token for token. That is fair queueing with
the virtual time of WF2Q+ (Bennett, Zhang 1997) and an allowance, so that requests which nobody suffers from stay whole.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from math import inf
from operator import attrgetter
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt on its way to the device."""

    tokens: NDArray[np.int32]  # [length]
    adapter: AdapterRef | None
    arrived_s: float
    passed_over: int = 0
    solo: bool = False  # must run alone: it was in a batch that failed
    cancelled: bool = False
    turn: tuple[float, int] = field(default=(0.0, 0), init=False)  # its place in the queue

    @property
    def flow(self) -> str:
        """Whose share it counts for: its adapter's name, whatever the revision, "" for the base."""
        return flow_of(self.adapter)


def flow_of(adapter: AdapterRef | None) -> str:
    """`Sequence.flow` of prompts for an adapter."""
    return adapter.name if adapter else ""


W = TypeVar("W", bound=Sequence)
_IN_USE = 16  # allowances that are served until an adapter that is not asked for counts no more
_TURN = attrgetter("turn")


@dataclass(slots=True)
class _Flow:
    """What waits of one adapter."""

    prompts: int = 0
    tokens: int = 0
    last: float = -inf  # turn of the one that came last


class FairQueue(Generic[W]):
    """Waiting prompts, first to be served first.

    Args:
        allowance: tokens that an adapter may have waiting before the rest of its prompts stand back.
    """

    def __init__(self, allowance: int) -> None:
        self._allowance = allowance
        self._ordered: list[W] = []
        self._flows: dict[str, _Flow] = {}
        self._arrivals = count()
        self._now = 0.0  # virtual time: the tokens that each adapter in use should have been served by now
        self._served = 0  # tokens in all
        self._used: OrderedDict[str, int] = OrderedDict()  # adapters in use: `_served` when last asked for
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[W]:
        return iter(self._ordered)

    def tokens_of(self, flow: str) -> int:
        """How many tokens of an adapter ("": the base) wait."""
        return self._flows[flow].tokens if flow in self._flows else 0

    def tokens_within(self) -> int:
        """Waiting tokens of the adapters that keep to their allowance."""
        return sum(flow.tokens for flow in self._flows.values() if flow.tokens <= self._allowance)

    def floods(self, work: W) -> bool:
        """Whether its adapter has more waiting than its allowance."""
        return self._flows[work.flow].tokens > self._allowance

    def add(self, work: W) -> None:
        """Put a prompt where its turn is."""
        flow = self._flows.setdefault(work.flow, _Flow())
        within = flow.tokens + len(work.tokens) <= self._allowance
        self._put(work, flow, max(flow.last, self._now + (0 if within else flow.tokens)))
        self._used[work.flow] = self._served
        self._used.move_to_end(work.flow)

    def put_back(self, works: Iterable[W]) -> None:
        """Put prompts of a failed batch at the front, in this order."""
        for work in works:
            self._put(work, self._flows.setdefault(work.flow, _Flow()), -inf)

    def _forget(self) -> None:
        """Adapters that nobody has asked for of late are in use no more."""
        while self._used:
            name, asked = next(iter(self._used.items()))
            if asked > self._served - _IN_USE * self._allowance:
                return
            if name in self._flows:
                self._used[name] = self._served
                self._used.move_to_end(name)
            else:
                del self._used[name]

    def _put(self, work: W, flow: _Flow, turn: float) -> None:
        work.turn = turn, next(self._arrivals)
        flow.last = max(flow.last, turn)
        flow.prompts += 1
        flow.tokens += len(work.tokens)
        self.tokens += len(work.tokens)
        insort(self._ordered, work, key=_TURN)

    def remove(self, works: Iterable[W]) -> None:
        """Take prompts out."""
        for work in works:
            at = bisect_left(self._ordered, work.turn, key=_TURN)
            assert self._ordered[at] is work
            del self._ordered[at]
            self.tokens -= len(work.tokens)
            flow = self._flows[work.flow]
            flow.prompts -= 1
            flow.tokens -= len(work.tokens)
            if not flow.prompts:
                del self._flows[work.flow]

    def served(self, works: Iterable[W]) -> None:
        """Take prompts out that are computed now: it is the turn of those that come after them."""
        served = list(works)
        self.remove(served)
        tokens = sum(len(work.tokens) for work in served)
        self._now += tokens / max(len(self._used), 1)
        self._served += tokens
        self._forget()
        if self._ordered:  # what the first has had beyond its share is forgotten, but for an allowance
            self._now = max(self._now, self._ordered[0].turn[0] - self._allowance)
