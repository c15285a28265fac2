"""A request that would wait for too long is refused, by what waits and how fast that is served."""

import contextlib
from typing import Any, cast

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.limits import check_wait
from ranklet.replicas.engine.plan import Part
from ranklet.replicas.engine.sequence import Sequence, flow_of
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.errors import Saturated
from tests.bench.fair_texts import TimedDevice
from tests.replicas.asking import PATIENCE_S, ask, submit, until
from tests.replicas.engine.given import make_sequence
from tests.replicas.engine.recording import MakeEngine, Prompts
from tests.replicas.engine.simulation import Asked, Simulation

FLOOD, LIGHT, *OTHERS = (AdapterRef(f"a{index}", f"/{index}", "1") for index in range(6))
STEP = 100  # tokens


class Site:
    """A queue from which steps of `STEP` tokens are served. Each takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.queue = FairQueue(STEP)
        self.now_s = 0.0
        self._step_s = step_s

    def ask(self, tokens: int, adapter: AdapterRef, max_wait_s: float | None) -> Sequence:
        sequence = make_sequence(tokens, adapter)
        check_wait(self.queue, max_wait_s, [sequence], self.now_s)
        self.queue.add([sequence])
        return sequence

    def serve(self) -> list[Sequence]:
        batch: list[Sequence] = []
        for each in self.queue:
            if batch and sum(one.need.tokens for one in batch) + each.need.tokens > STEP:
                break
            batch.append(each)
        self.queue.serve([Part(each, each.epoch, 0, each.need.tokens, each.need.head) for each in batch], self.now_s)
        self.queue.charge(sum(each.need.tokens for each in batch))
        self.now_s += self._step_s
        return batch


@pytest.mark.parametrize(("tokens", "flows"), [(25, 1), (50, 4), (45, 3)])
def test_accepted_requests_of_a_flood_begin_within_the_limit(tokens: int, flows: int) -> None:
    """Adapters send twice what the engine can serve."""
    site, asked, waits, refused, limit_s = Site(step_s=0.4), dict[Sequence, float](), list[float](), 0, 20.0
    while site.now_s < 4 * limit_s:
        for number in range(2 * STEP // tokens):
            try:
                asked[site.ask(tokens, OTHERS[number % flows], limit_s)] = site.now_s
            except Saturated:
                refused += 1
        began_s = site.now_s
        waits += [began_s - asked.pop(each) for each in site.serve()]
    assert refused
    assert 0.7 * limit_s <= max(waits) <= 1.25 * limit_s


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_flood_is_no_reason_to_refuse_another_adapter(tokens: int) -> None:
    site, limit_s = Site(step_s=1.0), 4.0
    for _ in range(400):
        site.ask(10, FLOOD, None)
    for _ in range(20):
        site.serve()
        site.ask(tokens, LIGHT, limit_s)
    with pytest.raises(Saturated, match=r"expected a wait of at most 4 s .* got \d\d s") as refused:
        site.ask(10, FLOOD, limit_s)
    assert 10 <= refused.value.retry_after_s <= 60
    with pytest.raises(Saturated) as refused:
        site.ask(10, FLOOD, max_wait_s=site.queue.tokens_of(flow_of(FLOOD)) / STEP)
    assert 1 <= refused.value.retry_after_s <= 10, "until it would wait for less than the limit"


def test_nothing_is_refused_before_the_rate_is_known_or_after_the_queue_was_short() -> None:
    site = Site(step_s=1.0)
    for _ in range(100):
        site.ask(STEP, FLOOD, max_wait_s=1.0)
    for _ in range(5):
        site.serve()
    with pytest.raises(Saturated):
        site.ask(STEP, FLOOD, max_wait_s=1.0)
    while len(site.queue):
        site.serve()
    for _ in range(100):
        site.ask(STEP, FLOOD, max_wait_s=1.0)


def test_texts_that_wait_for_rows_are_refused_by_how_fast_rows_become_free() -> None:
    """Rows of texts become free at a rate that tokens of prompts say nothing about."""
    running = Simulation(
        pages=400, rows=4, slots=1, max_tokens=200, max_adapters=1, max_model_len=320, depth=1,
        shares_prefixes=False,
    )  # fmt: skip
    running.device = cast(Any, TimedDevice(1))
    step_s, limit_s = 0.25, 20.0
    waiting, waits = dict[Asked, float](), list[float]()
    while running.now_s < 120:
        with contextlib.suppress(Saturated):
            outputs = 8 + 3 * len(running.asked) % 17
            waiting[running.generate([[1, 2, 3]], max_tokens=outputs, max_wait_s=limit_s)] = running.now_s
        running.step()
        running.now_s += step_s
        running.deliver()
        for each in [each for each in waiting if each.pieces]:
            asked_s = waiting.pop(each)
            if asked_s > 2 * limit_s:  # the rate was known
                waits.append(running.now_s - asked_s)
    assert 0.7 * limit_s <= max(waits) <= 1.4 * limit_s


def test_texts_that_use_what_others_leave_are_no_reason_to_refuse_another_adapter() -> None:
    """The waiting ones are within their adapter's allowance, but those that run have served it ahead of the other."""
    running = Simulation(
        pages=400, rows=4, slots=2, max_tokens=200, max_adapters=2, max_model_len=320, costs=StepCost(step=100.0),
        depth=1, shares_prefixes=False,
    )  # fmt: skip
    running.load((FLOOD, LIGHT))
    running.device = cast(Any, TimedDevice(2))
    popular, waiting, waits = list[Asked](), dict[Asked, int](), list[int]()
    for step in range(1200):
        popular = [each for each in popular if each.result is None]
        popular += [running.generate([[1, 2, 3]], FLOOD, max_tokens=50) for _ in range(34 - len(popular))]
        if step % 20 == 0:
            limit_s = 20.0 if step > 400 else None  # before, the popular one is hardly ahead
            waiting[running.generate([[1, 2, 4]], LIGHT, max_tokens=5, max_wait_s=limit_s)] = step
        running.step()
        running.now_s += 0.25
        running.deliver()
        waits += [step - waiting.pop(each) for each in [each for each in waiting if each.pieces]]
    assert max(waits[-40:]) <= 20
    with pytest.raises(Saturated):
        running.generate([[1, 2, 3]], FLOOD, max_tokens=50, max_wait_s=20.0)


@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_a_large_request_is_refused_if_what_waits_of_others_takes_too_long(shares_prefixes: bool) -> None:
    """All others are within their keys' allowances. The large one comes after them, and nothing of its key waits."""
    running = Simulation(
        pages=400, rows=4, slots=1, max_tokens=200, max_adapters=1, max_model_len=320, depth=1,
        shares_prefixes=shares_prefixes,
    )  # fmt: skip
    running.device = cast(Any, TimedDevice(1))
    for number in range(200):
        running.generate([[1, 2, 3]], max_tokens=10, key_name=f"key{number}")
    for _ in range(60):
        running.step()
        running.now_s += 1.0
        running.deliver()
    for large in ([[3] * 250], [[3] * 70] * 4):
        with pytest.raises(Saturated):
            running.generate(large, max_tokens=10, key_name="large", max_wait_s=60.0)
    running.generate([[3] * 250], max_tokens=10, key_name="large", max_wait_s=2000.0)


def test_an_engine_refuses_what_would_wait_for_too_long_and_serves_the_rest(
    make_engine: MakeEngine, tokens: Prompts
) -> None:
    engine = make_engine(max_wait_s=0.01, max_batch_tokens=512)
    with engine.paused():
        sent = [submit(engine, tokens) for _ in range(15)]
    refusals: list[Saturated] = []

    def is_refused() -> bool:
        try:
            sent.append(submit(engine, tokens))
        except Saturated as error:
            refusals.append(error)
        return bool(refusals)

    engine.start()
    until(is_refused)
    assert "at most 0.01 s on this replica (engine.max_wait_s)" in refusals[0].message
    for each in sent:
        each.result(PATIENCE_S)
    assert len(ask(engine, tokens).result) == len(tokens)
