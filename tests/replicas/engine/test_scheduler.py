"""Limits, order and the bounds in the scheduler's docstring, on random traffic."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.scheduler import Scheduler
from ranklet.replicas.engine.sequence import PATIENCE, Sequence
from ranklet.replicas.engine.step_sizes import StepSizes
from tests.replicas.engine.given import make_sequence

REFS = [AdapterRef(f"a{index}", f"/{index}", "1") for index in range(6)]
MAX_TOKENS = 20


@dataclass
class SchedulerLimits:
    """Limits of a scheduler under test. No sequence is longer than `tokens`."""

    tokens: int = MAX_TOKENS
    requests: int = 5
    adapters: int = 2
    demand: int = 3

    def scheduler(self, queue: Iterable[Sequence] = ()) -> Scheduler:
        made = Scheduler(
            max_tokens=self.tokens, max_sequences=self.requests, max_adapters=self.adapters, max_demand=self.demand
        )
        for each in queue:
            made.queue.add([each])
        return made


def distinct(sequences: list[Sequence]) -> list[AdapterRef]:
    """Return the adapters in order of first appearance."""
    return list(dict.fromkeys(each.adapter for each in sequences if each.adapter is not None))


sequences = st.builds(
    make_sequence,
    st.integers(1, MAX_TOKENS),
    st.none() | st.sampled_from(REFS),
    solo=st.integers(0, 9).map(lambda draw: draw == 0),
    cancelled=st.integers(0, 7).map(lambda draw: draw == 0),
)  # fmt: skip
queues = st.lists(sequences, max_size=30)
limits = st.builds(SchedulerLimits, requests=st.integers(1, 6), adapters=st.integers(1, 4), demand=st.integers(1, 6))
residents = st.frozensets(st.sampled_from(REFS))


@given(queues, limits, st.integers(1, MAX_TOKENS + 5))
def test_a_step_is_closed_at_the_size_that_is_enough(
    queue: list[Sequence], limit: SchedulerLimits, enough: int
) -> None:
    scheduler = limit.scheduler(queue)
    whole = scheduler.propose(lambda _: True)
    scheduler.set_sizes(StepSizes(enough=enough))
    early = scheduler.propose(lambda _: True)
    assert early.sequences == whole.sequences[: len(early.sequences)]
    assert early.sequences or not whole.sequences
    assert early.tokens >= min(enough, whole.tokens)
    if scheduler.queue.tokens <= MAX_TOKENS:
        assert not early.sequences or early.tokens - early.sequences[-1].need.tokens < enough


@given(queues, limits, residents)
def test_a_step_keeps_every_limit(
    queue: list[Sequence], limit: SchedulerLimits, resident: frozenset[AdapterRef]
) -> None:
    scheduler = limit.scheduler(queue)
    found = scheduler.propose(resident.__contains__)
    assert found.tokens == sum(each.need.tokens for each in found.sequences) <= limit.tokens
    assert len(found.sequences) <= limit.requests
    assert len(distinct(found.sequences)) <= limit.adapters
    assert all(each.adapter is None or each.adapter in resident for each in found.sequences)
    assert not any(each.cancelled for each in found.sequences)
    assert len(found.sequences) == 1 or not any(each.solo for each in found.sequences)
    usable = {None, *resident}
    ready = [each for each in scheduler.queue if not each.cancelled and each.adapter in usable]
    assert found.sequences[:1] == ready[:1], "the first ready sequence is in the next step"


@given(queues, limits, residents)
def test_demand_lists_the_first_adapters_in_slots_or_not(
    queue: list[Sequence], limit: SchedulerLimits, resident: frozenset[AdapterRef]
) -> None:
    scheduler = limit.scheduler(queue)
    found = scheduler.propose(resident.__contains__)
    assert found.demand == distinct([each for each in scheduler.queue if not each.cancelled])[: limit.demand]


@given(queues, limits)
def test_no_sequence_is_lost_or_served_twice(queue: list[Sequence], limit: SchedulerLimits) -> None:
    scheduler, served, dropped = limit.scheduler(queue), list[Sequence](), list[Sequence]()
    for _ in range(len(queue) + 1):
        before = list(scheduler.queue)
        found = scheduler.propose(lambda _: True)
        assert list(scheduler.queue) == before, "a proposal changes nothing"
        scheduler.commit(found)
        served += found.sequences
        dropped += found.cancelled
    assert len(scheduler.queue) == scheduler.queue.tokens == 0
    assert sorted(map(id, served + dropped)) == sorted(map(id, queue))
    assert {id(each) for each in dropped} == {id(each) for each in queue if each.cancelled}


@dataclass
class ArrivalLoop:
    """Arrivals and steps in turn, until every sequence is served."""

    scheduler: Scheduler
    slots: int
    resident: list[AdapterRef] = field(default_factory=list)
    overtaken: dict[Sequence, int] = field(default_factory=dict)
    served: int = 0

    def ready(self, each: Sequence) -> bool:
        return each.adapter is None or each.adapter in self.resident

    def add(self, arrivals: list[Sequence]) -> None:
        for each in arrivals:
            self.overtaken[each] = 0
            self.scheduler.queue.add([each])

    def step(self) -> StepPlan:
        """Run a step, then load the demanded adapters: the oldest get and keep the slots."""
        found = self.scheduler.propose(self.resident.__contains__)
        chosen = set(map(id, found.sequences))
        waiting = list(self.scheduler.queue)
        last = max((index for index, each in enumerate(waiting) if id(each) in chosen), default=-1)
        for each in waiting[: last + 1]:
            if id(each) not in chosen and self.ready(each):
                self.overtaken[each] += 1
                assert self.overtaken[each] <= PATIENCE, "a ready sequence is overtaken at most PATIENCE times"
        self.scheduler.commit(found)
        self.served += len(found.sequences)
        kept = [ref for ref in self.resident if ref not in found.demand]
        self.resident = (found.demand + kept)[: self.slots]
        return found


@settings(max_examples=150)
@given(
    st.lists(st.lists(sequences.filter(lambda each: not each.cancelled), max_size=8), max_size=15),
    limits,
    st.integers(1, 4),
)
def test_a_ready_sequence_is_overtaken_at_most_patience_times(
    arrivals: list[list[Sequence]], limit: SchedulerLimits, slots: int
) -> None:
    traffic = ArrivalLoop(
        SchedulerLimits(requests=limit.requests, adapters=min(limit.adapters, slots), demand=slots).scheduler(), slots
    )
    for some in arrivals:
        traffic.add(some)
        traffic.step()
    total = sum(map(len, arrivals))
    rounds = 0
    while len(traffic.scheduler.queue):
        found = traffic.step()
        rounds += 1
        assert found.sequences or rounds <= 2 * total + 1, "it makes no progress"
    assert traffic.served == total


def test_a_long_sequence_is_served_among_many_short_ones() -> None:
    scheduler = SchedulerLimits(requests=100).scheduler()
    scheduler.queue.add([make_sequence(2)])
    long = make_sequence(MAX_TOKENS)
    scheduler.queue.add([long])
    for batch in range(PATIENCE + 2):
        for _ in range(10):
            scheduler.queue.add([make_sequence(2)])
        found = scheduler.propose(lambda _: True)
        if long in found.sequences:
            assert batch >= 1
            return
        scheduler.commit(found)
    raise AssertionError("the long prompt starved")


def test_an_adapter_beyond_the_adapter_limit_is_served() -> None:
    scheduler = SchedulerLimits(requests=100, adapters=1).scheduler()
    rare = make_sequence(1, REFS[1])
    scheduler.queue.add([make_sequence(1, REFS[0])])
    scheduler.queue.add([rare])
    for batch in range(PATIENCE + 2):
        scheduler.queue.add([make_sequence(1, REFS[0])])
        found = scheduler.propose(lambda _: True)
        scheduler.commit(found)
        if rare in found.sequences:
            assert batch >= 1
            return
    raise AssertionError("the rare adapter starved")


def test_a_flooding_adapter_fills_no_large_step_while_others_have_requests() -> None:
    """Without others it may fill a large step."""
    scheduler = SchedulerLimits(requests=100).scheduler()
    scheduler.set_sizes(StepSizes(beside=8))
    for _ in range(300):
        scheduler.queue.add([make_sequence(2, REFS[0])])
    for _ in range(12):
        found = scheduler.propose(lambda _: True)
        scheduler.commit(found)
    assert found.tokens == MAX_TOKENS
    scheduler.queue.add([late := make_sequence(2, REFS[1])])
    for has_others in (True, False):
        found = scheduler.propose(lambda _: True)
        assert (late in found.sequences) == has_others
        assert found.tokens == 8
        scheduler.commit(found)


def test_sequences_of_a_failed_step_run_first_and_in_steps_of_their_own() -> None:
    scheduler = SchedulerLimits().scheduler()
    scheduler.queue.add([make_sequence(1)])
    again = [make_sequence(3, REFS[0], solo=True), make_sequence(2, solo=True)]
    scheduler.queue.put_back(again)
    assert scheduler.queue.tokens == 6
    for each in again:
        found = scheduler.propose(lambda _: True)
        assert found.sequences == [each]
        scheduler.commit(found)
    assert len(scheduler.queue) == 1


def test_a_sequence_without_its_adapter_does_not_delay_the_others() -> None:
    scheduler = SchedulerLimits().scheduler()
    for _ in range(3 * PATIENCE):
        scheduler.queue.add([make_sequence(1, REFS[0])])
    base = make_sequence(1)
    scheduler.queue.add([base])
    found = scheduler.propose(lambda _: False)
    assert found.sequences == [base]
    assert found.demand == [REFS[0]]
