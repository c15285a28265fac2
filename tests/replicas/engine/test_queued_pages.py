"""What waiting texts are expected to find in the prefix cache counts neither as work nor towards a flow's allowance."""

from typing import Any, cast

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.sequence import flow_of
from ranklet.replicas.engine.step_cost import StepCost
from tests.bench.fair_texts import TimedDevice
from tests.replicas.engine.simulation import Asked, Simulation

ONE, TWO = REFS = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(2)]
SYSTEM = [3, 1, 2] * PAGE_TOKENS  # three pages
COMMON = len(SYSTEM)
ROWS, ALLOWANCE = 16, 400
COSTS = StepCost(step=100.0, mixed=10.0, decode=10.0)


def simulation(*, has_slots: bool = True) -> Simulation:
    running = Simulation(
        pages=400, rows=ROWS, slots=2, max_tokens=ALLOWANCE, max_adapters=2, max_model_len=600, costs=COSTS,
        slowdown=2.0,
    )  # fmt: skip
    running.load(REFS if has_slots else ())
    running.device = cast(Any, TimedDevice(2))  # ends no text early
    return running


def ask(
    running: Simulation, number: int, adapter: AdapterRef = ONE, system: list[int] = SYSTEM, **params: Any
) -> Asked:
    params.setdefault("max_tokens", 50)
    return running.generate([[*system, number % 30 + 1, number // 30 + 1]], adapter, **params)


def works(*asked: Asked) -> list[int]:
    return [sequence.work for each in asked for sequence in each.request.sequences]


def test_texts_that_wait_with_a_common_beginning_count_it_once() -> None:
    running = simulation(has_slots=False)
    first, second, third = (ask(running, number) for number in range(3))
    assert works(first, second, third) == [COMMON + 2, 2, 2]
    assert running.scheduler.queue.work == COMMON + 6
    assert running.scheduler.queue.tokens == 3 * (COMMON + 2), "all need space in the queue"
    running.check()


def test_choices_of_one_prompt_count_it_once() -> None:
    running = simulation(has_slots=False)
    assert works(ask(running, 1, n=3)) == [COMMON + 2, 2, 2]


@pytest.mark.parametrize(("adapter", "salt"), [(TWO, ""), (ONE, "other")])
def test_what_texts_do_not_share_counts(adapter: AdapterRef, salt: str) -> None:
    running = simulation(has_slots=False)
    ask(running, 1)
    assert works(ask(running, 2, adapter, salt=salt)) == [COMMON + 2]


def test_what_another_keys_text_is_to_compute_counts() -> None:
    """That text may come far later: it may be of a flood."""
    running = simulation(has_slots=False)
    asked = [ask(running, number, key_name=f"key{number % 2}") for number in range(4)]
    assert works(*asked) == [COMMON + 2, COMMON + 2, 2, 2]
    running.check()


def test_a_key_that_sends_a_floods_prompts_once_more_floods_too() -> None:
    running = simulation()
    for key_name in ("flood", "again"):
        for number in range(5, 30):
            ask(running, 0, system=[number, *SYSTEM[1:]], max_tokens=1, key_name=key_name)
    other = ask(running, 0, TWO)
    steps = 0
    while not other.pieces:
        running.step()
        running.deliver()
        steps += 1
    assert steps <= 6


def test_texts_that_start_again_on_other_pages_count_what_they_compute_again() -> None:
    """A step has failed. No page is shared any more."""
    running = simulation()
    texts = [ask(running, number) for number in range(4)]
    while not all(each.pieces for each in texts):
        running.step()
        running.deliver()
    running.preempt_all()
    again = [len(each.request.sequences[0].ids) for each in texts]
    assert works(*texts) == [again[0], *(length - COMMON for length in again[1:])]
    for _ in range(6):
        running.step()
        running.deliver()
    ask(running, 0, TWO)
    assert not running.scheduler.queue.flooding()


def test_a_part_of_a_beginning_counts_until_it_is_shared() -> None:
    running = simulation(has_slots=False)
    short = SYSTEM[:PAGE_TOKENS]
    found = works(ask(running, 1, system=short), ask(running, 2), ask(running, 3))
    assert found == [PAGE_TOKENS + 2, COMMON + 2 - PAGE_TOKENS, 2]


def test_a_cached_beginning_does_not_count() -> None:
    running = simulation()
    ask(running, 1)
    running.run(200)
    later = ask(running, 2)
    assert works(later) == [2]
    running.run(200)
    assert later.cached == {0: COMMON}


def test_a_beginning_counts_again_once_the_text_that_was_to_compute_it_is_cancelled() -> None:
    running = simulation(has_slots=False)
    first = ask(running, 1)
    first.request.cancel()
    running.scheduler.drop(first.request.sequences)
    assert works(ask(running, 2), ask(running, 3)) == [COMMON + 2, 2]


def test_a_page_that_two_texts_are_to_compute_is_expected_until_both_are_gone() -> None:
    running = simulation()
    ask(running, 0, system=SYSTEM[: 2 * PAGE_TOKENS])
    running.run(200)
    first = ask(running, 1)
    running.space.forget()
    second = ask(running, 2)
    assert works(first, second) == [PAGE_TOKENS + 2, COMMON + 2]
    for asked in (first, second):
        assert works(ask(running, 3)) == [2]
        running.scheduler.drop(asked.request.sequences)


def test_many_texts_of_a_cached_beginning_are_no_flood_beside_another_adapter() -> None:
    running = simulation()
    for ref in REFS:
        ask(running, 0, ref)
    running.run(200)
    texts = [ask(running, number, REFS[number % 2]) for number in range(6 * ROWS)]
    assert sum(len(each.prompts[0]) for each in texts) > 10 * ALLOWANCE
    most = 0
    while running.scheduler.has_waiting():
        while running.step() is not None:
            most = max(most, len(running.scheduler.holders))
            assert not running.scheduler.queue.flooding()
        running.deliver()
    assert most == ROWS


def test_prompts_whose_pages_were_evicted_while_they_waited_count_towards_their_flow() -> None:
    running = simulation()
    systems = [[number, *SYSTEM[1:]] for number in range(5, 9)]
    for system in systems:
        ask(running, 0, TWO, system)
        running.run(200)
    waiting = [ask(running, 1, TWO, system, max_tokens=1) for system in systems]
    assert sum(works(*waiting)) < ALLOWANCE < len(systems) * COMMON
    running.space.forget()
    flow = flow_of(TWO)
    assert flow not in running.scheduler.queue.flooding()
    running.run(200)
    ask(running, 0, ONE)  # what others leave counts for none
    assert flow in running.scheduler.queue.flooding()
