"""Nothing starves: bounds on the waits of streams, of new requests and of sequences that need pages."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.sequence import Sequence, flow_of
from ranklet.replicas.engine.step_cost import LEAST_PIECE, StepCost
from ranklet.replicas.engine.step_sizes import StepSizes
from tests.replicas.engine.given import given_costs
from tests.replicas.engine.simulated_device import LAST, MEAN, VOCAB, expected_text
from tests.replicas.engine.simulation import Asked, Simulation

ONE, TWO = REFS = [AdapterRef(f"a{index}", f"/{index}", f"a{index}-1") for index in range(2)]
BUDGET = 100  # tokens of a step, and the allowance of an adapter
NO_FLOOD = 100_000  # an allowance that no adapter exceeds

Arrival = tuple[str, int, AdapterRef | None, int]  # kind, length, adapter, most output tokens
arrivals = st.tuples(
    st.sampled_from(("text", "text", "last", "mean")), st.integers(1, 200), st.sampled_from((None, *REFS)),
    st.integers(1, 60),
)  # fmt: skip
slowdowns = st.sampled_from((1.0, 1.1, 1.3, 2.0))
traffic = st.lists(st.lists(arrivals, max_size=4), min_size=1, max_size=12)


def simulation(
    *, pages: int = 24, rows: int = 4, costs: StepCost = StepCost(), slowdown: float = 1.0, max_model_len: int = 320,
    tokens: int = BUDGET, allowance: int | None = None,
) -> Simulation:  # fmt: skip
    """Return a simulation whose adapters are in their slots."""
    made = Simulation(
        pages=pages, rows=rows, slots=len(REFS), max_tokens=tokens, max_adapters=len(REFS),
        max_model_len=max_model_len, costs=costs, slowdown=slowdown, depth=1,
    )  # fmt: skip
    made.load(REFS)
    made.scheduler.set_sizes(StepSizes(allowance=allowance))
    return made


def submit(running: Simulation, kind: str, length: int, ref: AdapterRef | None, most: int) -> Asked:
    prompt = [1 + (length * 7 + each * each) % (VOCAB - 1) for each in range(length)]
    if kind == "text":
        return running.generate([prompt], ref, max_tokens=most)
    return running.embed([prompt[:BUDGET] if kind == "mean" else prompt], ref, head=MEAN if kind == "mean" else LAST)


def serve(running: Simulation, drawn: list[list[Arrival]], check: Callable[[StepPlan, list[Sequence]], None]) -> None:
    """Submit requests between steps, and go on until all are answered.

    Args:
        check: called with each plan after its commit, and the queue before it.
    """

    def step() -> bool:
        queue = list(running.scheduler.queue)
        plan = running.step()
        if plan is not None:
            check(plan, queue)
        if running.in_flight:
            running.deliver()
        return plan is not None

    for some in drawn:
        for each in some:
            submit(running, *each)
        step()
    for _ in range(5000):
        if not step():
            break
    for asked in running.asked:
        asked.check()


def streams(running: Simulation) -> set[Sequence]:
    """Return the sequences that wait for their next token."""
    queued = set(running.scheduler.queue)
    return {each for each in running.sequences() if each.row is not None and each.left and each not in queued}


@settings(max_examples=60)
@given(traffic, st.integers(5, 24), given_costs, slowdowns)
def test_a_stream_waits_for_at_most_one_step(
    drawn: list[list[Arrival]], pages: int, costs: StepCost, slowdown: float
) -> None:
    running = simulation(pages=pages, costs=costs, slowdown=slowdown, allowance=NO_FLOOD)
    before: set[Sequence] = set()
    waited: dict[Sequence, int] = {}

    def check(plan: StepPlan, queue: list[Sequence]) -> None:
        nonlocal before
        for each in before - set(plan.preempted):
            waited[each] = 0 if each in plan.decodes else waited.get(each, 0) + 1
            assert waited[each] <= 1
        before = streams(running)

    serve(running, drawn, check)


@settings(max_examples=60)
@given(traffic, st.integers(5, 24), given_costs, slowdowns)
def test_prompts_slow_decodes_down_by_the_factor_at_most_and_always_go_on(
    drawn: list[list[Arrival]], pages: int, costs: StepCost, slowdown: float
) -> None:
    """The least piece may cost more. The rows are too few for a burst."""
    running = simulation(pages=pages, costs=costs, slowdown=slowdown, allowance=NO_FLOOD)

    def check(plan: StepPlan, queue: list[Sequence]) -> None:
        if not plan.decodes:
            return
        alone = costs.decodes(len(plan.decodes), sum(each.computed - 1 for each in plan.decodes))
        added = sum(costs.piece(part.tokens, part.start) for part in plan.parts)
        most = max((slowdown - 1) * alone - costs.mixed, (slowdown - 1) * 256)
        assert added <= most + 1e-6 or [part.tokens <= LEAST_PIECE for part in plan.parts] == [True]
        begun = [each for each in queue if each.row is not None and each not in plan.started + plan.preempted]
        assert plan.parts or not begun, "a prompt that has begun goes on in every step"

    serve(running, drawn, check)


@settings(max_examples=60)
@given(traffic, st.integers(5, 12))
def test_the_first_holder_is_never_preempted(drawn: list[list[Arrival]], pages: int) -> None:
    running = simulation(pages=pages)
    order: list[Sequence] = []  # holders, in the order in which they started

    def check(plan: StepPlan, queue: list[Sequence]) -> None:
        assert not set(order[:1]) & set(plan.preempted)
        for flow in {each.flow for each in plan.preempted}:
            own = [each for each in order if each.flow == flow]
            gone = [each for each in plan.preempted if each.flow == flow]
            assert gone == own[len(own) - len(gone) :], "those of an adapter that started last"
        order[:] = [each for each in order if each.row is not None and each not in plan.preempted] + plan.started

    serve(running, drawn, check)


@settings(max_examples=60)
@given(traffic, st.integers(5, 12))
def test_a_text_that_waits_for_pages_is_not_overtaken_by_another_text(drawn: list[list[Arrival]], pages: int) -> None:
    running = simulation(pages=pages, allowance=NO_FLOOD)

    def check(plan: StepPlan, queue: list[Sequence]) -> None:
        if plan.tokens + LEAST_PIECE > BUDGET or plan.preempted:
            return  # the others do not fit because of their tokens
        waiting = [each for each in queue if each.need.keeps_cache and each.row is None and not each.computed]
        started = [each for each in queue if each.need.keeps_cache and each in plan.started]
        assert not waiting or all(queue.index(each) < queue.index(waiting[0]) for each in started)

    serve(running, drawn, check)


def lasting(length: int, tokens: int, adapter: AdapterRef) -> list[int]:
    """Return a prompt whose text has at least this many tokens."""
    return next(
        prompt
        for letter in range(1, VOCAB)
        for last in range(1, VOCAB)
        if len(expected_text(prompt := [letter] * (length - 1) + [last], adapter, tokens)) == tokens
    )


@pytest.mark.parametrize("kind", ["text", "last", "mean"])
def test_a_new_request_starts_soon_whatever_floods(kind: str) -> None:
    """It waits for the flood's allowance and for a row, not for the rest of the flood."""
    running = simulation(rows=2)
    for length in range(50, 90):
        submit(running, kind, length, ONE, 20)
    for _ in range(20):
        running.step()
        running.deliver()
    late = running.generate([lasting(60, 10, TWO)], TWO, max_tokens=10)
    (sequence,) = late.request.sequences
    overtaken = 0
    while sequence.row is None:
        plan = running.step()
        assert plan is not None
        overtaken += len(plan.started) + len([part for part in plan.parts if not part.uses_pages])
        running.deliver()
    assert overtaken <= 6
    running.run(5000)


@pytest.mark.parametrize("lengths", [(20, 20), (80, 20), (10, 90)])
def test_adapters_that_always_have_requests_waiting_get_equal_shares(lengths: tuple[int, int]) -> None:
    """Tokens of prompts and of texts count."""
    running = simulation()
    prompts = {ref: lasting(length, 30, ref) for ref, length in zip(REFS, lengths, strict=True)}
    served = dict.fromkeys(REFS, 0)
    while sum(served.values()) < 12_000:
        waiting = Counter(each.adapter for each in running.scheduler.queue)
        for ref in REFS:
            for _ in range(6 - waiting[ref]):
                running.generate([prompts[ref]], ref, max_tokens=30, salt=str(len(running.asked)))
        plan = running.step()
        assert plan is not None
        for sequence, tokens in [
            *((part.sequence, part.tokens) for part in plan.parts),
            *((each, 1) for each in plan.decodes),
        ]:
            assert sequence.adapter is not None
            served[sequence.adapter] += tokens
        running.deliver()
    assert max(served.values()) <= 1.15 * min(served.values()), served


def test_a_long_prompt_beside_other_prompts_gets_its_share_of_the_cost() -> None:
    """Embeddings of another adapter, which is within its allowance, always wait, and a text decodes."""
    costs = StepCost(attend=0.001)
    running = simulation(pages=80, costs=costs, slowdown=1.2, max_model_len=3000, tokens=2000)
    running.generate([lasting(5, 150, ONE)], ONE, max_tokens=150)
    running.step()
    running.deliver()
    running.generate([[1] * 2900], TWO, max_tokens=1)
    spent: dict[AdapterRef | None, float] = dict.fromkeys(REFS, 0.0)
    for _ in range(149):
        if not running.scheduler.queue.tokens_of(flow_of(ONE)):
            running.embed([[1] * 10] * 190, ONE)
        plan = running.step()
        assert plan is not None
        assert plan.decodes
        for part in plan.parts:
            spent[part.sequence.adapter] += costs.piece(part.tokens, part.start)
        running.deliver()
    assert 0.3 <= spent[ONE] / spent[TWO] <= 3
