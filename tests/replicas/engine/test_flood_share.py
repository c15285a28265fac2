"""What another adapter's requests get of an engine while one adapter floods it with texts."""

from typing import Any, cast

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.flood_share import brief_texts
from ranklet.replicas.engine.sequence import flow_of
from ranklet.replicas.engine.step_cost import StepCost
from tests.bench.fair_texts import TimedDevice
from tests.replicas.engine.simulation import Asked, Simulation

FLOOD, OTHER = REFS = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(2)]
ROWS = 16
COSTS = StepCost(step=100.0, mixed=10.0, decode=10.0)  # 16 texts make 98 tokens in the time that one makes 41
BRIEF = 9  # texts that make most of the tokens a second of 16
PROMPT = [1, 2, 3, 5] * 5


def flooded(*, pages: int = 400, requests: int = 40) -> Simulation:
    """Return a simulation all of whose rows run texts of one adapter, of which more wait than its allowance."""
    running = Simulation(
        pages=pages, rows=ROWS, slots=2, max_tokens=200, max_adapters=2, max_model_len=320, costs=COSTS, slowdown=2.0,
        depth=2, shares_prefixes=False,
    )  # fmt: skip
    running.load(REFS)
    running.device = cast(Any, TimedDevice(2))  # ends no text early
    for number in range(requests):
        running.generate([[*PROMPT, number % 30 + 1]], FLOOD, max_tokens=200)
    for _ in range(8 if requests else 0):
        go_on(running)
    return running


def go_on(running: Simulation) -> None:
    """Launch steps up to the depth of the device, and deliver the oldest."""
    while running.step() is not None:
        pass
    running.deliver()
    running.check()


def steps_until_first_token(running: Simulation, asked: Asked) -> int:
    steps = 0
    while not asked.pieces:
        go_on(running)
        steps += 1
    return steps


def test_most_of_the_rate_needs_fewer_texts() -> None:
    def rate(texts: int) -> float:
        return texts / COSTS.decodes(texts, 0)

    assert brief_texts(COSTS, ROWS, 0.0) == BRIEF
    assert rate(BRIEF) <= 0.8 * rate(ROWS) <= rate(BRIEF + 1)
    assert brief_texts(StepCost(), ROWS, 0.0) == 0, "steps of more texts are not faster"


@pytest.mark.parametrize(("requests", "other", "key_name"), [(40, OTHER, ""), (3000, OTHER, ""), (40, FLOOD, "other")])
def test_a_text_gets_a_row_that_a_flood_holds_soon_however_much_waits(
    requests: int, other: AdapterRef, key_name: str
) -> None:
    running = flooded(requests=requests)
    assert running.scheduler.holders.flows == {flow_of(FLOOD): ROWS}
    asked = running.generate([PROMPT], other, max_tokens=5, key_name=key_name)
    assert steps_until_first_token(running, asked) <= 5
    assert running.scheduler.preemptions == 1, "one row is enough"


def test_a_text_gets_pages_that_a_flood_holds_soon() -> None:
    running = flooded(pages=30)
    asked = running.generate([PROMPT * 10], OTHER, max_tokens=5)
    assert steps_until_first_token(running, asked) <= 6
    running.run(20_000)


def test_a_flood_starts_no_text_beyond_its_part_while_another_adapter_has_some() -> None:
    running = flooded(requests=100)
    for _ in range(400):
        if running.scheduler.holders.flows[flow_of(OTHER)] + running.scheduler.queue.tokens_of(flow_of(OTHER)) == 0:
            running.generate([[*PROMPT, len(running.asked) % 30]], OTHER, max_tokens=20)
        before = running.scheduler.holders.flows[flow_of(FLOOD)]
        go_on(running)
        assert running.scheduler.holders.flows[flow_of(FLOOD)] <= max(before, BRIEF)
        if running.scheduler.queue.tokens_of(flow_of(FLOOD)) < 250:
            break
    assert running.scheduler.holders.flows[flow_of(FLOOD)] >= 1, "it goes on"


def test_cancelled_texts_of_a_flood_leave_the_queue_while_its_others_are_held_back() -> None:
    running = flooded(requests=100)
    running.generate([PROMPT], OTHER, max_tokens=200)
    flood = [each for each in running.scheduler.queue if each.flow == flow_of(FLOOD)]
    for sequence in flood[:60]:
        sequence.request.cancel()
    for _ in range(3):
        go_on(running)
    assert running.scheduler.holders.flows[flow_of(FLOOD)] > BRIEF, "no text of it may start"
    assert not any(sequence in running.scheduler.queue for sequence in flood[:60])
    assert all(sequence in running.scheduler.queue for sequence in flood[60:])


def test_a_flow_ahead_of_others_floods_while_none_waits_if_most_texts_are_its_own() -> None:
    running = flooded(requests=0)
    flows = {FLOOD: 12, OTHER: 4}
    asked: dict[AdapterRef, list[Asked]] = {ref: [] for ref in REFS}
    counts = []
    for step in range(600):
        for ref, count in flows.items():
            asked[ref] = [each for each in asked[ref] if each.result is None]
            missing = count - len(asked[ref])
            asked[ref] += [running.generate([[step % 30 + 1]], ref, max_tokens=50) for _ in range(missing)]
        go_on(running)
        counts.append(len(running.scheduler.holders))
    assert max(counts[-100:]) == BRIEF


def test_decodes_of_a_flood_wait_for_embeddings_of_others_but_go_on() -> None:
    running = flooded()
    decodes = []
    for _ in range(40):
        running.embed([PROMPT], OTHER)
        plan = running.step()
        if plan is not None:
            decodes.append(len(plan.decodes))
        running.deliver()
    assert 0 in decodes
    assert sum(each > 0 for each in decodes) >= 5
    running.run(20_000)


def test_a_flood_of_embeddings_that_has_its_part_of_a_step_does_not_close_it_to_texts() -> None:
    running = flooded(requests=0)
    running.generate([PROMPT], OTHER, max_tokens=200)
    for _ in range(4):
        go_on(running)
    for _ in range(40):
        running.embed([PROMPT], FLOOD)
    asked = running.generate([PROMPT], OTHER, max_tokens=5)
    plan = running.step()
    assert plan is not None
    served = [part.sequence for part in plan.parts]
    assert asked.request.sequences[0] in served
    assert 1 <= sum(each.flow == flow_of(FLOOD) for each in served) <= 4, "its part"
    running.run(1000)


def test_a_flood_alone_keeps_all_rows() -> None:
    running = flooded(requests=60)
    for _ in range(10):
        go_on(running)
        assert len(running.scheduler.holders) == ROWS
    assert not running.scheduler.preemptions


def test_an_engine_plans_on_after_short_texts() -> None:
    """What their adapter has decoded still counts, and so do the others' last requests, although nobody has any."""
    running = Simulation(
        pages=200, rows=ROWS, slots=2, max_tokens=20, max_adapters=2, max_model_len=100, costs=COSTS, depth=2
    )
    running.device = cast(Any, TimedDevice(2))
    running.generate([[1, 2]], OTHER, max_tokens=1)
    asked = [running.generate([[1, number + 2]], FLOOD, max_tokens=8) for number in range(14)]
    running.run(2000)
    assert all(each.pieces for each in asked)
    assert running.step() is None
