"""Budgets, order and the bounds that the scheduler's docstring states, on random traffic."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import Sequence
from ranklet.replicas.engine.scheduler import PATIENCE, Scheduler, StepPlan

REFS = [AdapterRef(f"a{index}", f"/{index}", "1") for index in range(6)]
MAX_TOKENS = 20


def work(tokens: int, adapter: AdapterRef | None = None, *, solo: bool = False, cancelled: bool = False) -> Sequence:
    return Sequence(np.zeros(tokens, np.int32), adapter, 0.0, solo=solo, cancelled=cancelled)


@dataclass
class Limits:
    """The limits of a scheduler under test; prompts longer than `tokens` never get this far."""

    tokens: int = MAX_TOKENS
    requests: int = 5
    adapters: int = 2
    demand: int = 3

    def scheduler(self) -> Scheduler[Sequence]:
        return Scheduler(
            max_tokens=self.tokens, max_requests=self.requests, max_adapters=self.adapters, max_demand=self.demand
        )


def distinct(works: list[Sequence]) -> list[AdapterRef]:
    """Their adapters, in order of first appearance."""
    return list(dict.fromkeys(each.adapter for each in works if each.adapter is not None))


works = st.builds(
    work,
    st.integers(1, MAX_TOKENS),
    st.none() | st.sampled_from(REFS),
    solo=st.integers(0, 9).map(lambda draw: draw == 0),
    cancelled=st.integers(0, 7).map(lambda draw: draw == 0),
)  # fmt: skip
queues = st.lists(works, max_size=30)
limits = st.builds(Limits, requests=st.integers(1, 6), adapters=st.integers(1, 4), demand=st.integers(1, 6))
residents = st.frozensets(st.sampled_from(REFS))


@given(queues, limits, st.integers(1, MAX_TOKENS + 5))
def test_a_batch_is_closed_when_it_has_enough(queue: list[Sequence], limit: Limits, enough: int) -> None:
    scheduler = limit.scheduler()
    for each in queue:
        scheduler.queue.add(each)
    whole, early = scheduler.propose(lambda _: True), scheduler.propose(lambda _: True, enough)
    assert early.batch == whole.batch[: len(early.batch)]
    assert early.batch or not whole.batch
    assert early.tokens >= min(enough, whole.tokens)
    if scheduler.queue.tokens <= MAX_TOKENS:
        assert not early.batch or early.tokens - len(early.batch[-1].tokens) < enough


@given(queues, limits, residents)
def test_a_batch_keeps_every_budget(queue: list[Sequence], limit: Limits, resident: frozenset[AdapterRef]) -> None:
    scheduler = limit.scheduler()
    for each in queue:
        scheduler.queue.add(each)
    found = scheduler.propose(resident.__contains__)
    assert found.tokens == sum(len(each.tokens) for each in found.batch) <= limit.tokens
    assert len(found.batch) <= limit.requests
    assert len(distinct(found.batch)) <= limit.adapters
    assert all(each.adapter is None or each.adapter in resident for each in found.batch)
    assert not any(each.cancelled for each in found.batch)
    assert len(found.batch) == 1 or not any(each.solo for each in found.batch)
    usable = {None, *resident}
    ready = [each for each in scheduler.queue if not each.cancelled and each.adapter in usable]
    assert found.batch[:1] == ready[:1], "the first ready prompt is always in the next batch"


@given(queues, limits, residents)
def test_demand_is_the_first_adapters_whether_resident_or_not(
    queue: list[Sequence], limit: Limits, resident: frozenset[AdapterRef]
) -> None:
    scheduler = limit.scheduler()
    for each in queue:
        scheduler.queue.add(each)
    found = scheduler.propose(resident.__contains__)
    assert found.demand == distinct([each for each in scheduler.queue if not each.cancelled])[: limit.demand]


@given(queues, limits)
def test_nothing_is_lost_or_served_twice(queue: list[Sequence], limit: Limits) -> None:
    scheduler, served, dropped = limit.scheduler(), list[Sequence](), list[Sequence]()
    for each in queue:
        scheduler.queue.add(each)
    for _ in range(len(queue) + 1):
        before = list(scheduler.queue)
        found = scheduler.propose(lambda _: True)
        assert list(scheduler.queue) == before, "a proposal changes nothing"
        scheduler.commit(found)
        served += found.batch
        dropped += found.cancelled
    assert len(scheduler.queue) == scheduler.queue.tokens == 0
    assert sorted(map(id, served + dropped)) == sorted(map(id, queue))
    assert {id(each) for each in dropped} == {id(each) for each in queue if each.cancelled}


@dataclass
class Traffic:
    """A loop of the engine: arrivals, a batch, arrivals, a batch, until all is answered."""

    scheduler: Scheduler[Sequence]
    slots: int
    resident: list[AdapterRef] = field(default_factory=list)
    overtaken: dict[Sequence, int] = field(default_factory=dict)
    served: int = 0

    def ready(self, each: Sequence) -> bool:
        return each.adapter is None or each.adapter in self.resident

    def add(self, arrivals: list[Sequence]) -> None:
        for each in arrivals:
            self.overtaken[each] = 0
            self.scheduler.queue.add(each)

    def step(self) -> StepPlan[Sequence]:
        """One batch, then the loads that its demand allows: the oldest adapters get and keep the slots."""
        found = self.scheduler.propose(self.resident.__contains__)
        chosen = set(map(id, found.batch))
        waiting = list(self.scheduler.queue)
        last = max((index for index, each in enumerate(waiting) if id(each) in chosen), default=-1)
        for each in waiting[: last + 1]:
            if id(each) not in chosen and self.ready(each):
                self.overtaken[each] += 1
                assert self.overtaken[each] <= PATIENCE, "a ready prompt is overtaken in at most PATIENCE batches"
        self.scheduler.commit(found)
        self.served += len(found.batch)
        kept = [ref for ref in self.resident if ref not in found.demand]
        self.resident = (found.demand + kept)[: self.slots]
        return found


@settings(max_examples=150)
@given(
    st.lists(st.lists(works.filter(lambda each: not each.cancelled), max_size=8), max_size=15),
    limits,
    st.integers(1, 4),
)
def test_no_ready_prompt_is_overtaken_more_often_than_stated(
    arrivals: list[list[Sequence]], limit: Limits, slots: int
) -> None:
    traffic = Traffic(
        Limits(requests=limit.requests, adapters=min(limit.adapters, slots), demand=slots).scheduler(), slots
    )
    for some in arrivals:
        traffic.add(some)
        traffic.step()
    total = sum(map(len, arrivals))
    rounds = 0
    while len(traffic.scheduler.queue):
        found = traffic.step()
        rounds += 1
        assert found.batch or rounds <= 2 * total + 1, "it must not stand still"
    assert traffic.served == total


def test_a_long_prompt_gets_through_a_stream_of_short_ones() -> None:
    scheduler = Limits(requests=100).scheduler()
    scheduler.queue.add(work(2))
    long = work(MAX_TOKENS)
    scheduler.queue.add(long)
    for batch in range(PATIENCE + 2):
        for _ in range(10):
            scheduler.queue.add(work(2))
        found = scheduler.propose(lambda _: True)
        if long in found.batch:
            assert batch >= 1
            return
        scheduler.commit(found)
    raise AssertionError("the long prompt starved")


def test_an_adapter_that_no_batch_has_room_for_gets_one() -> None:
    scheduler = Limits(requests=100, adapters=1).scheduler()
    rare = work(1, REFS[1])
    scheduler.queue.add(work(1, REFS[0]))
    scheduler.queue.add(rare)
    for batch in range(PATIENCE + 2):
        scheduler.queue.add(work(1, REFS[0]))
        found = scheduler.propose(lambda _: True)
        scheduler.commit(found)
        if rare in found.batch:
            assert batch >= 1
            return
    raise AssertionError("the rare adapter starved")


def test_a_flood_fills_no_batch_beyond_what_is_enough_beside_others() -> None:
    """Alone it may: nobody else waits for the batch."""
    scheduler = Limits(requests=100).scheduler()
    for _ in range(300):
        scheduler.queue.add(work(2, REFS[0]))
    for _ in range(12):
        found = scheduler.propose(lambda _: True, None, 8)
        scheduler.commit(found)
    assert found.tokens == MAX_TOKENS
    scheduler.queue.add(late := work(2, REFS[1]))
    for has_others in (True, False):
        found = scheduler.propose(lambda _: True, None, 8)
        assert (late in found.batch) == has_others
        assert found.tokens == 8
        scheduler.commit(found)


def test_prompts_of_a_failed_batch_come_first_and_alone() -> None:
    scheduler = Limits().scheduler()
    scheduler.queue.add(work(1))
    again = [work(3, REFS[0], solo=True), work(2, solo=True)]
    scheduler.queue.put_back(again)
    assert scheduler.queue.tokens == 6
    for each in again:
        found = scheduler.propose(lambda _: True)
        assert found.batch == [each]
        scheduler.commit(found)
    assert len(scheduler.queue) == 1


def test_a_prompt_passed_by_for_its_adapter_does_not_hold_up_the_rest() -> None:
    scheduler = Limits().scheduler()
    for _ in range(3 * PATIENCE):
        scheduler.queue.add(work(1, REFS[0]))
    base = work(1)
    scheduler.queue.add(base)
    found = scheduler.propose(lambda _: False)
    assert found.batch == [base]
    assert found.demand == [REFS[0]]
