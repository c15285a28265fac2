"""The order of the queue: by arrival within the allowance, in turn beyond it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.fair_share import fair_share
from ranklet.replicas.engine.sequence import Sequence
from tests.replicas.engine.given import make_sequence

REFS = [None, *(AdapterRef(f"a{index}", f"/{index}", "1") for index in range(3))]
ALLOWANCE = 20

prompts = st.tuples(st.integers(1, 30), st.sampled_from(REFS))


def queue_of(sequences: list[Sequence], allowance: int = ALLOWANCE) -> FairQueue:
    queue = FairQueue(allowance)
    for each in sequences:
        queue.add([each])
    return queue


def serve(queue: FairQueue, tokens: int) -> list[Sequence]:
    """Serve one step from the front."""
    batch: list[Sequence] = []
    for each in queue:
        if batch and sum(one.need.tokens for one in batch) + each.need.tokens > tokens:
            break
        batch.append(each)
    queue.remove(batch)
    queue.charge(sum(each.need.tokens for each in batch))
    return batch


@given(st.lists(prompts, max_size=12))
def test_within_the_allowance_the_order_is_that_of_arrival(drawn: list[tuple[int, AdapterRef | None]]) -> None:
    sequences = [make_sequence(*each) for each in drawn]
    assert list(queue_of(sequences, allowance=sum(tokens for tokens, _ in drawn))) == sequences


@given(st.lists(st.lists(prompts, max_size=6), max_size=10), st.integers(1, 60))
def test_each_adapters_sequences_stay_in_order_and_none_is_lost(
    arrivals: list[list[tuple[int, AdapterRef | None]]], batch: int
) -> None:
    queue, came, went = queue_of([]), list[Sequence](), list[Sequence]()
    for some in arrivals:
        for each in (new := [make_sequence(*one) for one in some]):
            queue.add([each])
        came += new
        went += serve(queue, batch)
        assert queue.tokens == sum(each.need.tokens for each in queue)
        for ref in REFS:
            name = ref.name if ref else ""
            assert queue.tokens_of(name) == sum(each.need.tokens for each in queue if each.flow == name)
    while len(queue):
        went += serve(queue, batch)
    for ref in REFS:
        assert [each for each in went if each.adapter is ref] == [each for each in came if each.adapter is ref]


def test_a_later_adapter_waits_only_for_the_allowance_of_a_flooding_one() -> None:
    flood = [make_sequence(10, REFS[1]) for _ in range(100)]
    queue = queue_of(flood)
    late = make_sequence(10, REFS[2])
    queue.add([late])
    assert list(queue).index(late) == 2, "it is behind the allowance of the flooding adapter"
    assert not queue.floods(late)
    assert queue.floods(flood[2])


@pytest.mark.parametrize("flows", [2, 3])
def test_flooding_adapters_get_equal_shares(flows: int) -> None:
    """Adapters with more waiting than can be served get equal tokens, whatever the length of their prompts."""
    queue = queue_of([])
    for index in range(flows):
        for _ in range(600 // (index + 1)):
            queue.add([make_sequence(index + 1, REFS[index])])
    served = dict.fromkeys(REFS[:flows], 0)
    for _ in range(10):
        for each in serve(queue, 30):
            served[each.adapter] += each.need.tokens
    assert max(served.values()) - min(served.values()) <= ALLOWANCE + 2 * flows


def test_an_adapter_with_few_requests_does_not_wait_for_a_flooding_one() -> None:
    """Beside an adapter that floods without end, a prompt of another adapter is in one of the next two steps."""
    queue = queue_of([make_sequence(10, REFS[1]) for _ in range(50)])
    for _ in range(40):
        late = make_sequence(5, REFS[2])
        queue.add([late])
        waited = 0
        while late not in serve(queue, 30):
            waited += 1
            for _ in range(3):
                queue.add([make_sequence(10, REFS[1])])
        assert waited <= 1


def test_adapters_within_their_allowance_do_not_starve_a_flooding_one() -> None:
    """Three adapters that always have a little waiting could take every step; the fourth still gets its share."""
    queue = queue_of([make_sequence(10, REFS[1]) for _ in range(200)])
    others = [None, REFS[2], REFS[3]]
    served = 0
    for _ in range(100):
        for ref in others:
            while queue.tokens_of(ref.name if ref else "") < 20:
                queue.add([make_sequence(10, ref)])
        served += sum(each.need.tokens for each in serve(queue, 30) if each.adapter is REFS[1])
    assert served >= 0.8 * 100 * 30 / 4


def test_an_adapter_that_used_idle_capacity_is_not_penalized_later() -> None:
    """One adapter floods while little else waits. When another floods too, both get equal shares from then on."""
    queue = queue_of([])
    for _ in range(200):
        while queue.tokens_of("a0") < 200:
            queue.add([make_sequence(10, REFS[1])])
        queue.add([make_sequence(5, REFS[2])])
        serve(queue, 30)
    served = dict.fromkeys(REFS, 0)
    for _ in range(40):
        for ref in (REFS[1], REFS[3]):
            assert ref is not None
            while queue.tokens_of(ref.name) < 200:
                queue.add([make_sequence(10, ref)])
        for each in serve(queue, 30):
            served[each.adapter] += each.need.tokens
    assert abs(served[REFS[1]] - served[REFS[3]]) <= 200, "apart from sequences that waited before"
    assert min(served[REFS[1]], served[REFS[3]]) > 0.3 * 40 * 30


def test_a_past_flood_has_no_effect() -> None:
    queue = queue_of([make_sequence(10, REFS[1]) for _ in range(50)])
    while len(queue):
        serve(queue, 30)
    fresh = [make_sequence(5, REFS[1]), make_sequence(5, REFS[2])]
    for each in fresh:
        queue.add([each])
    assert list(queue) == fresh


def test_sequences_put_back_are_first() -> None:
    queue = queue_of([make_sequence(10, REFS[1]) for _ in range(5)])
    failed = serve(queue, 30)
    queue.put_back(failed)
    assert list(queue)[: len(failed)] == failed
    assert queue.tokens == 50


@given(st.integers(1, 10**7), st.integers(1, 6))
def test_a_new_flow_finds_space(limit: int, flows: int) -> None:
    held = [0] * flows
    for _ in range(40):
        for index in range(flows):
            held[index] = min(held[index] + limit // 10 + 1, fair_share(limit, sum(held) - held[index]))
    assert sum(held) <= limit
    assert fair_share(limit, sum(held)) >= (limit - sum(held)) * 4 // 5
    assert limit - sum(held) >= 0.9 * limit / (4 * flows + 1) - flows
