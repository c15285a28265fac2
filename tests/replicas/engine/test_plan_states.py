"""Random requests on a simulated device: each text is that of its prompt and adapter alone, and everything is freed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.errors import RankletError
from tests.replicas.engine.given import given_costs
from tests.replicas.engine.simulated_device import LAST, MEAN, VOCAB
from tests.replicas.engine.simulation import Asked, Simulation

NAMES = ("one", "two", "three", "four")
INVOCATIONS = {"three": (3, 3), "four": (4,)}  # of aLoRA adapters
MAX_MODEL_LEN = 320  # five pages

# Prompts that often share their first pages, and often contain an invocation.
prompts = st.builds(
    lambda letter, length, middle, tail: [letter] * length + middle + tail,
    st.integers(1, 2), st.sampled_from((0, 1, 63, 64, 65, 127, 128, 130, 192, 200)),
    st.sampled_from(([], [], [3, 3], [4], [3, 3, 2, 4, 3, 3])),
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6),
)  # fmt: skip


def revision_of(name: str, number: int) -> AdapterRef:
    return AdapterRef(name, f"/{name}", f"{name}-{number}", invocation=INVOCATIONS.get(name))


class PlanStates(RuleBasedStateMachine):
    """Requests come, are computed, preempted, cancelled and fail, while adapters are loaded, replaced and unloaded."""

    @initialize(
        pages=st.integers(5, 12), rows=st.integers(1, 4), slots=st.integers(1, 3),
        max_tokens=st.sampled_from((24, 64, 100, 320)), costs=given_costs, slowdown=st.sampled_from((1.0, 1.2, 2.0)),
        max_adapters=st.integers(1, 3), depth=st.integers(1, 2), shares=st.sampled_from((True, True, True, False)),
    )  # fmt: skip
    def begin(
        self, pages: int, rows: int, slots: int, max_tokens: int, costs: StepCost, slowdown: float, max_adapters: int,
        depth: int, shares: bool,
    ) -> None:  # fmt: skip
        self.simulation = Simulation(
            pages=pages, rows=rows, slots=slots, max_tokens=max_tokens, max_adapters=min(max_adapters, slots),
            max_model_len=MAX_MODEL_LEN, costs=costs, slowdown=slowdown, depth=depth, shares_prefixes=shares,
        )  # fmt: skip
        self.longest_prompt = min(max_tokens, MAX_MODEL_LEN - 110)
        self.revisions = dict.fromkeys(NAMES, 1)
        self.cancelled: list[Asked] = []
        self.failures = 0

    def adapter(self, name: str | None) -> AdapterRef | None:
        return None if name is None else revision_of(name, self.revisions[name])

    @rule(
        asked=st.lists(prompts, min_size=1, max_size=2), name=st.none() | st.sampled_from(NAMES),
        most=st.sampled_from((1, 2, 5, 40, 100)), n=st.sampled_from((1, 1, 1, 2, 3)), salt=st.sampled_from(("", "s")),
        has_grammar=st.booleans(),
    )  # fmt: skip
    def generate(
        self, asked: list[list[int]], name: str | None, most: int, n: int, salt: str, *, has_grammar: bool
    ) -> None:
        adapter = self.adapter(name)
        self.simulation.generate(
            asked, adapter, max_tokens=most, n=n, salt=salt, has_grammar=has_grammar, key_name=salt
        )

    @rule(asked=prompts, name=st.none() | st.sampled_from(NAMES), head=st.sampled_from((LAST, MEAN)))
    def embed(self, asked: list[int], name: str | None, head: object) -> None:
        is_whole = head is MEAN and name not in INVOCATIONS
        if is_whole:
            asked = asked[: self.longest_prompt]
        self.simulation.embed([asked], self.adapter(name), head=MEAN if is_whole else LAST)

    @rule()
    def launch(self) -> None:
        self.simulation.step()

    @precondition(lambda self: self.failures < 3)
    @rule()
    def launch_failing(self) -> None:
        plan = self.simulation.step(fails=True)
        self.failures += plan is not None and plan.computes

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def deliver(self) -> None:
        self.simulation.deliver()

    @rule(count=st.integers(1, 40))
    def work(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()
            if self.simulation.in_flight:
                self.simulation.deliver()

    @precondition(lambda self: self.simulation.masks)
    @rule()
    def end_mask(self) -> None:
        self.simulation.end_mask()

    @rule()
    def preempt(self) -> None:
        self.simulation.preempt_all()

    @precondition(lambda self: self.simulation.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.simulation.asked))
        asked.request.cancel()
        self.cancelled.append(asked)

    @precondition(lambda self: self.simulation.loading)
    @rule()
    def end_load(self) -> None:
        self.simulation.end_load()

    @rule(name=st.sampled_from(NAMES))
    def replace(self, name: str) -> None:
        self.revisions[name] += 1

    @rule(name=st.sampled_from(NAMES), revision=st.integers(1, 3))
    def unload(self, name: str, revision: int) -> None:
        self.simulation.slots.drop(revision_of(name, revision))

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        simulation.run(6_000)
        for asked in simulation.asked:
            if asked in self.cancelled and asked.result is None:
                continue
            if self.failures and isinstance(asked.result, RankletError):
                continue
            asked.check()
        simulation.check()
        assert simulation.space.pool.used == 0
        assert simulation.space.table.free == simulation.space.table.filler
        assert not any(sequence.holds_slot for sequence in simulation.sequences())
        simulation.space.forget()
        for asked in simulation.asked[:20]:
            again = simulation.generate(asked.prompts[:1], asked.adapter, max_tokens=1).request.sequences[0]
            assert again.expected_cached == 0, "nothing is cached, and no other text waits"
            simulation.scheduler.drop([again])
        for name in NAMES:
            for revision in range(1, self.revisions[name] + 1):
                ref = revision_of(name, revision)
                assert not simulation.slots.holds(ref) or simulation.slots.drop(ref), "a slot is still in use"


PlanStates.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPlanStates = PlanStates.TestCase
