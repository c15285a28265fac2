"""Planning a step takes no longer for a long queue: prompts are no longer tried once the step has no space for them."""

from typing import Any, cast

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS, PagePool, PrefixMatch
from ranklet.replicas.engine.step_cost import PromptBudget, StepCost
from tests.bench.fair_texts import TimedDevice
from tests.replicas.engine.simulation import Simulation

FLOOD, OTHER = REFS = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(2)]
WAITING, MOST_TRIED = 3000, 600


@pytest.fixture
def running() -> Simulation:
    made = Simulation(
        pages=400, rows=16, slots=2, max_tokens=200, max_adapters=2, max_model_len=320,
        costs=StepCost(step=100.0, mixed=10.0, decode=10.0), slowdown=2.0,
    )  # fmt: skip
    made.load(REFS)
    made.device = cast(Any, TimedDevice(2))  # ends no text early
    return made


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of tokens of prompts that were tried."""
    left: list[int] = []
    fit = PromptBudget.fit

    def counting(budget: PromptBudget, tokens: int, start: int, *, is_text: bool) -> int:
        left.append(tokens)
        return fit(budget, tokens, start, is_text=is_text)

    monkeypatch.setattr(PromptBudget, "fit", counting)
    return left


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of pages that were looked up in the prefix cache."""
    pages: list[int] = []
    match = PagePool.match

    def counting(pool: PagePool, hashes: list[bytes]) -> PrefixMatch:
        pages.append(len(hashes))
        return match(pool, hashes)

    monkeypatch.setattr(PagePool, "match", counting)
    return pages


def check_steps(running: Simulation, tried: list[int]) -> None:
    served = 0
    for _ in range(40):
        tried.clear()
        plan = running.step()
        assert len(tried) <= MOST_TRIED
        served += 0 if plan is None else len(plan.parts)
        running.deliver()
    assert served >= 20


def test_prompts_that_do_not_fit_behind_others_are_not_all_tried(running: Simulation, tried: list[int]) -> None:
    for _ in range(WAITING):
        running.embed([[1] * 80], FLOOD)
    check_steps(running, tried)


@pytest.mark.parametrize("outputs", [0, 1])
def test_prompts_of_a_flood_that_has_its_part_of_a_step_are_not_all_tried(
    running: Simulation, tried: list[int], outputs: int
) -> None:
    for number in range(8):
        running.generate([[2] * 20], OTHER, max_tokens=200, key_name=f"key{number}")
    for _ in range(12):
        running.step()
        running.deliver()
    for number in range(WAITING):
        prompt = [number % 39 + 1, *[1] * 99]
        running.generate([prompt], FLOOD, max_tokens=1) if outputs else running.embed([prompt], FLOOD)
    check_steps(running, tried)


def test_texts_that_wait_for_one_page_are_not_all_looked_up(running: Simulation, looked_up: list[int]) -> None:
    system = [1, 2, 3] * PAGE_TOKENS
    texts = [running.generate([[*system, number % 39 + 1]], OTHER, max_tokens=2) for number in range(WAITING)]
    for _ in range(3):
        looked_up.clear()
        running.step()
        assert len(looked_up) <= 64
        running.deliver()
    running.run(10_000)
    assert {each.cached[0] for each in texts} == {0, len(system)}, "all others found it"
