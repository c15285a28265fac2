"""Texts start beside decodes together while texts wait for rows, and only then."""

from typing import Any, cast

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.gathering import MOST_STEPS
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.engine.step_sizes import StepSizes
from tests.bench.fair_texts import TimedDevice
from tests.replicas.engine.simulation import Simulation

REF = AdapterRef("a", "/a", "a-1")
ROWS = 64
COSTS = StepCost(step=300.0, mixed=100.0)  # a row costs 6 in a full step
PROMPT = [1, 2, 3, 5]
FIRST_END = 20  # tokens of the shortest text


def simulation(texts: int, *, rows: int = ROWS, waiting: int = 20) -> Simulation:
    """Return a simulation with running texts, one of which ends in each step, and others that wait."""
    running = Simulation(
        pages=1000, rows=rows, slots=1, max_tokens=2000, max_adapters=1, max_model_len=2000, costs=COSTS, slowdown=2.0,
        depth=1, shares_prefixes=False, max_sequences=2 * rows,
    )  # fmt: skip
    running.load([REF])
    running.device = cast(Any, TimedDevice(1))  # ends no text early
    for number in range(texts):
        running.generate([PROMPT], REF, max_tokens=FIRST_END + number)
    while len(running.scheduler.holders.decoding) < texts:
        go_on(running)
    for _ in range(waiting):
        running.generate([PROMPT], REF, max_tokens=1000)
    return running


def go_on(running: Simulation) -> StepPlan:
    plan = running.step()
    assert plan is not None
    running.deliver()
    running.check()
    return plan


def test_texts_that_wait_for_rows_start_together() -> None:
    """A row is empty for as many steps as allowed at most."""
    running = simulation(ROWS)
    started = [len(go_on(running).parts) for _ in range(40)]
    first = started.index(MOST_STEPS + 1)
    assert not any(started[:first])
    assert started[first : first + 2 * MOST_STEPS + 2] == 2 * [MOST_STEPS + 1, *[0] * MOST_STEPS]
    running.run(2000)


def test_a_text_starts_at_once_if_rows_are_left() -> None:
    running = simulation(ROWS - 2, waiting=1)
    assert len(go_on(running).parts) == 1


def test_the_last_text_that_waits_starts_at_once() -> None:
    running = simulation(ROWS, waiting=1)
    plan = go_on(running)
    while not plan.parts:
        assert len(plan.decodes) == ROWS, "a row is empty"
        plan = go_on(running)


def test_embeddings_wait_for_nothing_and_texts_start_beside_them() -> None:
    running = simulation(ROWS)
    while not go_on(running).parts:
        pass
    assert not go_on(running).parts
    running.embed([PROMPT], REF)
    assert len(go_on(running).parts) == 3


@pytest.mark.parametrize("prompt", [[*PROMPT] * 40, [*PROMPT] * 200])
def test_a_prompt_that_fills_a_step_starts_at_once_and_goes_on(prompt: list[int]) -> None:
    """Others would not fit beside it."""
    running = simulation(ROWS, waiting=0)
    asked = [running.generate([prompt], REF, max_tokens=1000) for _ in range(4)]
    plan = go_on(running)
    while not plan.parts:
        assert len(plan.decodes) == ROWS
        plan = go_on(running)
    while not asked[0].pieces:
        assert go_on(running).parts


def test_a_text_starts_at_once_where_its_row_costs_more_than_prompts_do() -> None:
    """A row costs 151 here, and a step with prompts 100 more."""
    running = simulation(2, rows=2)
    plans = [go_on(running) for _ in range(FIRST_END + 10)]
    assert any(plan.parts for plan in plans)
    assert all(plan.parts for plan in plans if len(plan.decodes) < 2)


def test_texts_do_not_wait_on_the_cpu() -> None:
    running = simulation(ROWS)
    running.scheduler.set_sizes(StepSizes(gathers=False))
    started = [len(go_on(running).parts) for _ in range(40)]
    first = started.index(1)
    assert started[first : first + 10] == 10 * [1]
