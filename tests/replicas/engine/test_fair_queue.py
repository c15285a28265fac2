"""The order of the queue: by arrival within the allowance, in turn beyond it. Adapters and keys share alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.fair_share import fair_share
from ranklet.replicas.engine.sequence import Sequence, flow_of
from tests.replicas.engine.given import make_sequence

Owner = tuple[AdapterRef | None, str]  # adapter and name of the key

REFS = [None, *(AdapterRef(f"a{index}", f"/{index}", "1") for index in range(3))]
OWNERS: dict[str, list[Owner]] = {
    "adapters": [(ref, "") for ref in REFS],
    "keys": [(REFS[1], f"k{index}") for index in range(4)],
    "both": [(REFS[index // 2], f"k{index % 2}") for index in range(4)],
}
ALLOWANCE = 20

by_owners = pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
prompts = st.tuples(st.integers(1, 30), st.integers(0, 3))  # tokens, owner


def sequence_of(tokens: int, owner: Owner) -> Sequence:
    return make_sequence(tokens, *owner)


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
def test_within_the_allowance_the_order_is_that_of_arrival(drawn: list[tuple[int, int]]) -> None:
    sequences = [sequence_of(tokens, OWNERS["both"][owner]) for tokens, owner in drawn]
    assert list(queue_of(sequences, allowance=sum(tokens for tokens, _ in drawn))) == sequences


@given(st.lists(st.lists(prompts, max_size=6), max_size=10), st.integers(1, 60))
def test_each_owners_sequences_stay_in_order_and_none_is_lost(
    arrivals: list[list[tuple[int, int]]], batch: int
) -> None:
    owners = OWNERS["both"]
    queue, came, went = queue_of([]), list[Sequence](), list[Sequence]()
    for some in arrivals:
        for each in (new := [sequence_of(tokens, owners[owner]) for tokens, owner in some]):
            queue.add([each])
        came += new
        went += serve(queue, batch)
        assert queue.tokens == sum(each.need.tokens for each in queue)
        for flow in (flow_of(*owner) for owner in owners):
            assert queue.tokens_of(flow) == sum(each.need.tokens for each in queue if each.flow == flow)
    while len(queue):
        went += serve(queue, batch)
    for flow in (flow_of(*owner) for owner in owners):
        assert [each for each in went if each.flow == flow] == [each for each in came if each.flow == flow]


@by_owners
def test_a_later_adapter_waits_only_for_the_allowance_of_a_flooding_one(owners: list[Owner]) -> None:
    flood = [sequence_of(10, owners[1]) for _ in range(100)]
    queue = queue_of(flood)
    late = sequence_of(10, owners[2])
    queue.add([late])
    assert list(queue).index(late) == 2, "it is behind the allowance of the flooding adapter"
    assert not queue.floods(late)
    assert queue.floods(flood[2])


@by_owners
@pytest.mark.parametrize("flows", [2, 3])
def test_flooding_adapters_get_equal_shares(owners: list[Owner], flows: int) -> None:
    """Adapters with more waiting than can be served get equal tokens, whatever the length of their prompts."""
    queue = queue_of([])
    for index in range(flows):
        for _ in range(600 // (index + 1)):
            queue.add([sequence_of(index + 1, owners[index])])
    served = {flow_of(*owner): 0 for owner in owners[:flows]}
    for _ in range(10):
        for each in serve(queue, 30):
            served[each.flow] += each.need.tokens
    assert max(served.values()) - min(served.values()) <= ALLOWANCE + 2 * flows


@by_owners
def test_an_adapter_with_few_requests_does_not_wait_for_a_flooding_one(owners: list[Owner]) -> None:
    """Beside an adapter that floods without end, a prompt of another adapter is in one of the next two steps."""
    queue = queue_of([sequence_of(10, owners[1]) for _ in range(50)])
    for _ in range(40):
        late = sequence_of(5, owners[2])
        queue.add([late])
        waited = 0
        while late not in serve(queue, 30):
            waited += 1
            for _ in range(3):
                queue.add([sequence_of(10, owners[1])])
        assert waited <= 1


@by_owners
def test_adapters_within_their_allowance_do_not_starve_a_flooding_one(owners: list[Owner]) -> None:
    """Three adapters that always have a little waiting could take every step; the fourth still gets its share."""
    queue = queue_of([sequence_of(10, owners[1]) for _ in range(200)])
    flood, *others = owners[1], owners[0], *owners[2:]
    served = 0
    for _ in range(100):
        for owner in others:
            while queue.tokens_of(flow_of(*owner)) < 20:
                queue.add([sequence_of(10, owner)])
        served += sum(each.need.tokens for each in serve(queue, 30) if each.flow == flow_of(*flood))
    assert served >= 0.8 * 100 * 30 / 4


@by_owners
def test_an_adapter_that_used_idle_capacity_is_not_penalized_later(owners: list[Owner]) -> None:
    """One adapter floods while little else waits. When another floods too, both get equal shares from then on."""
    queue = queue_of([])
    for _ in range(200):
        while queue.tokens_of(flow_of(*owners[1])) < 200:
            queue.add([sequence_of(10, owners[1])])
        queue.add([sequence_of(5, owners[2])])
        serve(queue, 30)
    served = dict.fromkeys((flow_of(*owner) for owner in owners), 0)
    for _ in range(40):
        for owner in (owners[1], owners[3]):
            while queue.tokens_of(flow_of(*owner)) < 200:
                queue.add([sequence_of(10, owner)])
        for each in serve(queue, 30):
            served[each.flow] += each.need.tokens
    first, second = served[flow_of(*owners[1])], served[flow_of(*owners[3])]
    assert abs(first - second) <= 200, "apart from sequences that waited before"
    assert min(first, second) > 0.3 * 40 * 30


@by_owners
def test_an_adapter_whose_texts_use_what_others_leave_floods_once_others_wait(owners: list[Owner]) -> None:
    popular, other = owners[1], owners[2]
    queue = queue_of([])
    queue.charge_flow(flow_of(*popular), 2 * ALLOWANCE)
    queue.add([sequence_of(1, popular)])
    assert not queue.flooding()
    waits = sequence_of(1, other)
    queue.add([waits])
    assert queue.flooding() == {flow_of(*popular)}
    assert next(iter(queue)) is waits, "it comes first, though it came later"
    queue.remove([waits])
    assert not queue.flooding()


@by_owners
def test_a_past_flood_has_no_effect(owners: list[Owner]) -> None:
    queue = queue_of([sequence_of(10, owners[1]) for _ in range(50)])
    while len(queue):
        serve(queue, 30)
    fresh = [sequence_of(5, owners[1]), sequence_of(5, owners[2])]
    for each in fresh:
        queue.add([each])
    assert list(queue) == fresh


@pytest.mark.parametrize("waits", [True, False])
def test_the_number_of_owners_that_share_time_is_bounded(waits: bool) -> None:
    """Owners without requests are forgotten: the oldest if there are many, all others once enough was served."""
    queue = queue_of([])
    for index in range(4500):
        once = make_sequence(1, None, f"once{index}")
        queue.add([once])
        if not waits:
            queue.remove([once])  # it was cancelled
    serve(queue, 1)
    assert queue.active_flows == (4499 if waits else 4096)
    while len(queue):
        serve(queue, 1000)
    for _ in range(20):
        queue.add([sequence_of(ALLOWANCE, OWNERS["keys"][0])])
        serve(queue, ALLOWANCE)
    assert queue.active_flows == 1


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
