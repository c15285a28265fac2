"""The order of the queue: arrival for those within their allowance, turn by turn for those beyond it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue, Sequence
from ranklet.replicas.engine.fair_share import share_of_room

REFS = [None, *(AdapterRef(f"a{index}", f"/{index}", "1") for index in range(3))]
ALLOWANCE = 20

prompts = st.tuples(st.integers(1, 30), st.sampled_from(REFS))


def work(tokens: int, adapter: AdapterRef | None = None) -> Sequence:
    return Sequence(np.zeros(tokens, np.int32), adapter, 0.0)


def queue_of(works: list[Sequence], allowance: int = ALLOWANCE) -> FairQueue[Sequence]:
    queue: FairQueue[Sequence] = FairQueue(allowance)
    for each in works:
        queue.add(each)
    return queue


def serve(queue: FairQueue[Sequence], tokens: int) -> list[Sequence]:
    """One batch from the front."""
    batch: list[Sequence] = []
    for each in queue:
        if batch and sum(len(one.tokens) for one in batch) + len(each.tokens) > tokens:
            break
        batch.append(each)
    queue.served(batch)
    return batch


@given(st.lists(prompts, max_size=12))
def test_within_the_allowance_it_is_first_come_first_served(drawn: list[tuple[int, AdapterRef | None]]) -> None:
    works = [work(*each) for each in drawn]
    assert list(queue_of(works, allowance=sum(tokens for tokens, _ in drawn))) == works


@given(st.lists(st.lists(prompts, max_size=6), max_size=10), st.integers(1, 60))
def test_each_adapters_prompts_stay_in_order_and_none_is_lost(
    arrivals: list[list[tuple[int, AdapterRef | None]]], batch: int
) -> None:
    queue, came, went = queue_of([]), list[Sequence](), list[Sequence]()
    for some in arrivals:
        for each in (new := [work(*one) for one in some]):
            queue.add(each)
        came += new
        went += serve(queue, batch)
        assert queue.tokens == sum(len(each.tokens) for each in queue)
        for ref in REFS:
            name = ref.name if ref else ""
            assert queue.tokens_of(name) == sum(len(each.tokens) for each in queue if each.flow == name)
    while len(queue):
        went += serve(queue, batch)
    for ref in REFS:
        assert [each for each in went if each.adapter is ref] == [each for each in came if each.adapter is ref]


def test_a_flood_stands_back_for_who_comes_later() -> None:
    flood = [work(10, REFS[1]) for _ in range(100)]
    queue = queue_of(flood)
    late = work(10, REFS[2])
    queue.add(late)
    assert list(queue).index(late) == 2, "behind the allowance of the flood and no more"
    assert not queue.floods(late)
    assert queue.floods(flood[2])


@pytest.mark.parametrize("flows", [2, 3])
def test_floods_share_alike(flows: int) -> None:
    """Of adapters that all have more waiting than can be served, each gets as many tokens, whatever their prompts."""
    queue = queue_of([])
    for index in range(flows):
        for _ in range(600 // (index + 1)):
            queue.add(work(index + 1, REFS[index]))
    served = dict.fromkeys(REFS[:flows], 0)
    for _ in range(10):
        for each in serve(queue, 30):
            served[each.adapter] += len(each.tokens)
    assert max(served.values()) - min(served.values()) <= ALLOWANCE + 2 * flows


def test_a_light_adapter_never_waits_for_a_flood() -> None:
    """A flood that never ends, and one prompt of another adapter now and then: it is in the next batch but one."""
    queue = queue_of([work(10, REFS[1]) for _ in range(50)])
    for _ in range(40):
        late = work(5, REFS[2])
        queue.add(late)
        waited = 0
        while late not in serve(queue, 30):
            waited += 1
            for _ in range(3):
                queue.add(work(10, REFS[1]))
        assert waited <= 1


def test_who_keep_to_their_allowance_do_not_starve_a_flood() -> None:
    """Three adapters with little waiting, but always something, could take all there is; the fourth has its share."""
    queue = queue_of([work(10, REFS[1]) for _ in range(200)])
    others = [None, REFS[2], REFS[3]]
    served = 0
    for _ in range(100):
        for ref in others:
            while queue.tokens_of(ref.name if ref else "") < 20:
                queue.add(work(10, ref))
        served += sum(len(each.tokens) for each in serve(queue, 30) if each.adapter is REFS[1])
    assert served >= 0.8 * 100 * 30 / 4


def test_a_flood_that_had_the_rest_owes_nothing_to_a_new_one() -> None:
    """One adapter floods for long beside little else; when another floods too, both have as much from then on."""
    queue = queue_of([])
    for _ in range(200):
        while queue.tokens_of("a0") < 200:
            queue.add(work(10, REFS[1]))
        queue.add(work(5, REFS[2]))
        serve(queue, 30)
    served = dict.fromkeys(REFS, 0)
    for _ in range(40):
        for ref in (REFS[1], REFS[3]):
            assert ref is not None
            while queue.tokens_of(ref.name) < 200:
                queue.add(work(10, ref))
        for each in serve(queue, 30):
            served[each.adapter] += len(each.tokens)
    assert abs(served[REFS[1]] - served[REFS[3]]) <= 200, "but for what waited already"
    assert min(served[REFS[1]], served[REFS[3]]) > 0.3 * 40 * 30


def test_a_flood_that_is_over_is_forgotten() -> None:
    queue = queue_of([work(10, REFS[1]) for _ in range(50)])
    while len(queue):
        serve(queue, 30)
    fresh = [work(5, REFS[1]), work(5, REFS[2])]
    for each in fresh:
        queue.add(each)
    assert list(queue) == fresh


def test_prompts_put_back_come_first() -> None:
    queue = queue_of([work(10, REFS[1]) for _ in range(5)])
    failed = serve(queue, 30)
    queue.put_back(failed)
    assert list(queue)[: len(failed)] == failed
    assert queue.tokens == 50


@given(st.integers(1, 10**7), st.integers(1, 6))
def test_a_newcomer_finds_room(limit: int, flows: int) -> None:
    held = [0] * flows
    for _ in range(40):
        for index in range(flows):
            held[index] = min(held[index] + limit // 10 + 1, share_of_room(limit, sum(held) - held[index]))
    assert sum(held) <= limit
    assert share_of_room(limit, sum(held)) >= (limit - sum(held)) * 4 // 5
    assert limit - sum(held) >= 0.9 * limit / (4 * flows + 1) - flows
