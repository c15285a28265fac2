"""What an adapter within its allowance waits for while other adapters flood a replica on the CPU."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.forecast import Forecast
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.step_cost import LEAST_PIECE
from ranklet.replicas.engine.step_sizes import StepSizes, cpu_sizes
from tests.replicas.engine.simulated_device import LAST, MEAN
from tests.replicas.engine.simulation import Asked, Simulation

FLOOD, OTHER = REFS = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(2)]
MOST, SMALL = 8192, 256  # tokens; SMALL is the allowance too
LONGEST = 512
SIZES = StepSizes(enough=SMALL, beside=SMALL, longest=LONGEST, apart=True, allowance=SMALL)


def simulation() -> Simulation:
    """Return a simulation whose adapters are in their slots."""
    made = Simulation(
        pages=600, rows=64, slots=len(REFS), max_tokens=MOST, max_adapters=len(REFS), max_model_len=4096, depth=1
    )
    made.load(REFS)
    made.scheduler.set_sizes(SIZES)
    return made


def ask(running: Simulation, kind: str, ref: AdapterRef, lengths: list[int]) -> Asked:
    prompts = [[1 + (len(running.asked) + each) % 39] * length for each, length in enumerate(lengths)]
    if kind == "text":
        return running.generate(prompts, ref, max_tokens=1, salt=str(len(running.asked)))
    return running.embed(prompts, ref, head=MEAN if kind == "mean" else LAST)


def step(running: Simulation) -> StepPlan:
    plan = running.step()
    assert plan is not None
    running.deliver()
    return plan


def of_flood(plan: StepPlan) -> int:
    return sum(part.tokens for part in plan.parts if part.sequence.adapter == FLOOD)


floods = st.tuples(st.sampled_from(("text", "last", "mean")), st.integers(5, 150), st.integers(2, 5))
gaps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, SMALL)), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(floods, st.sampled_from(("text", "last", "mean")), gaps)
@example(("text", 5, 2), "mean", [(0, 119), (0, 256), (0, 1)])
def test_a_request_within_the_allowance_is_in_the_next_step_and_no_flood_makes_that_long(
    flood: tuple[str, int, int], kind: str, arrivals: list[tuple[int, int]]
) -> None:
    """Each client of one adapter sends its next request of 64 prompts when it gets an answer. Another adapter gets
    single prompts meanwhile. Those with mean pooling cannot join a step of texts, so the flood may have one step first.
    """
    running = simulation()
    flood_kind, length, clients = flood
    most_steps = 2 if (kind, flood_kind) == ("mean", "text") else 1
    flooding: list[Asked] = []

    def go_on() -> StepPlan:
        for _ in range(clients - sum(not each.request.is_complete for each in flooding)):
            flooding.append(ask(running, flood_kind, FLOOD, [length] * 64))
        return step(running)

    go_on()
    for gap, tokens in arrivals:
        for _ in range(gap):
            plan = go_on()
            assert of_flood(plan) < LONGEST + length, "what a request that comes now waits for"
        asked = ask(running, kind, OTHER, [tokens])
        for _ in range(most_steps):
            if not asked.request.is_complete:
                assert of_flood(go_on()) < SMALL + length
        assert asked.request.is_complete
    assert of_flood(go_on()) + of_flood(go_on()) > 0, "the flood is not left out of two steps in turn"


@pytest.mark.parametrize("kind", ["text", "last"])
def test_a_flood_gets_every_second_step_beside_requests_without_end(kind: str) -> None:
    running = simulation()
    for _ in range(16):
        ask(running, kind, FLOOD, [25] * 64)
    step(running)
    shares = []
    for _ in range(20):
        ask(running, kind, OTHER, [10])
        shares.append(of_flood(step(running)))
    assert [bool(each) for each in shares] in ([True, False] * 10, [False, True] * 10)
    assert max(shares) >= SMALL - LEAST_PIECE


def test_a_long_text_of_a_flood_is_cut() -> None:
    running = simulation()
    for _ in range(8):
        ask(running, "text", FLOOD, [4000])
    alone = [step(running).tokens for _ in range(4)]
    assert max(alone) <= LONGEST
    ask(running, "text", OTHER, [10])
    assert max(step(running).tokens for _ in range(4)) <= SMALL


def device_s(tokens: int) -> float:
    return 0.005 + tokens * 1e-4


def test_sizes_follow_what_steps_take() -> None:
    """From single prompts to a flood, no step is much longer than needed, and soon they are not much shorter."""
    forecast = Forecast()

    def run(tokens: int) -> float:
        forecast.on_launch(tokens, 0.0)
        forecast.on_finish(device_s(tokens), 0.0)
        return device_s(tokens)

    assert cpu_sizes(forecast).longest == cpu_sizes(forecast).beside == 2048
    for _ in range(100):
        run(6)
    beside, longest = [], []
    for _ in range(400):
        sizes = cpu_sizes(forecast)
        assert sizes.beside is not None
        beside.append(run(sizes.beside))
        sizes = cpu_sizes(forecast)
        assert sizes.longest is not None
        longest.append(run(min(sizes.longest, MOST)))
    assert max(beside) <= 0.11
    assert max(longest) <= 0.25
    assert min(beside[20:]) >= 0.015
    assert min(longest[20:]) >= 0.045
