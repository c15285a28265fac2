"""An engine without threads, tensors or files: tests decide when steps are launched, and when outputs come back."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.slots import SlotTable
from ranklet.replicas.cache.prefix import PrefixRoot
from ranklet.replicas.engine.generate import GenerateTask, Generation
from ranklet.replicas.engine.in_flight import InFlightStep
from ranklet.replicas.engine.kv_space import KvSpace, integrity_check
from ranklet.replicas.engine.limits import RequestLimits, check_wait
from ranklet.replicas.engine.params import EmbedParams, GenerateParams
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.request import Answer, Request
from ranklet.replicas.engine.result_thread import ResultThread
from ranklet.replicas.engine.scheduler import Scheduler
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.engine.tasks import EmbedTask, Task
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.grammar.text_grammar import TextGrammar
from ranklet.replicas.model.heads import Head, TextHead
from tests.replicas.engine.simulated_device import (
    END,
    LAST,
    TEXT,
    VOCAB,
    SimulatedDevice,
    SimulatedHead,
    drawn,
    expected_text,
    prompt_numbers,
)

_SOLO_OUTPUTS = 2  # as in pipeline.py


@dataclass(eq=False)
class Asked:
    """A submitted request, and its answer."""

    prompts: list[list[int]]
    adapter: AdapterRef | None
    params: EmbedParams | GenerateParams
    pieces: dict[int, list[int]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)  # tokens of the prompt, by text
    result: Answer | RankletError | None = None
    request: Request = field(init=False)

    def begun(self, index: int, cached_tokens: int) -> None:
        assert index not in self.pieces, "a text began after its first token"
        self.cached[index] = cached_tokens

    def delta(self, index: int, piece: Any) -> None:
        assert self.result is None, "a token came after the answer"
        self.pieces.setdefault(index, []).extend(piece[0])

    def done(self, result: Answer | RankletError) -> None:
        assert self.result is None, "a second answer"
        self.result = result

    def check(self) -> None:
        """Check the answer, and that the pieces are the answer's text."""
        assert isinstance(self.result, Answer), self.result
        if isinstance(self.params, EmbedParams):
            for prompt, vector in zip(self.prompts, self.result.result, strict=True):
                states, _ = prompt_numbers(prompt, self.adapter)
                assert vector.tolist() == [drawn(np.array(states, np.int64))]
            return
        generation = self.result.result
        assert isinstance(generation, Generation)
        assert len(generation.choices) == len(self.prompts) * self.params.n
        for index, choice in enumerate(generation.choices):
            prompt = self.prompts[index // self.params.n]
            assert choice.tokens.tolist() == expected_text(prompt, self.adapter, self.params.max_tokens)
            assert self.pieces[index] == choice.tokens.tolist()


class _AnyText:
    """A grammar of all texts."""

    def add_ends(self, end_ids: Iterable[int]) -> None:
        pass


class Simulation:
    """The order of calls is that of `Pipeline`; loads are started as by `AdapterManager`.

    Attributes:
        depth: number of steps on the device at once.
        now_s: the time, which whoever runs the simulation sets.
    """

    def __init__(
        self, *, pages: int, rows: int, slots: int, max_tokens: int, max_adapters: int, max_model_len: int,
        costs: StepCost = StepCost(), slowdown: float = 1.0, depth: int = 2, shares_prefixes: bool = True,
        max_sequences: int | None = None,
    ) -> None:  # fmt: skip
        self.depth = depth
        self.now_s = 0.0
        self.scheduler = Scheduler(
            max_tokens=max_tokens, max_sequences=max_sequences or rows, max_adapters=max_adapters,
            max_demand=slots, costs=costs, decode_slowdown=slowdown,
        )  # fmt: skip
        self.space = self.scheduler.space = KvSpace(pages, rows, max_model_len)
        self.slots = SlotTable(slots)
        self.loading: list[AdapterRef] = []
        self.device = SimulatedDevice(self.space, slots)
        self.in_flight: deque[tuple[InFlightStep, bool]] = deque()
        self.limits = RequestLimits(max_model_len, 1, VOCAB, max_model_len)
        self.results = ResultThread()  # which never starts: no result is slow here
        self.masks: deque[Sequence] = deque()  # sequences whose masks are computed
        self.asked: list[Asked] = []
        self._shares_prefixes = shares_prefixes

    def generate(
        self, prompts: list[list[int]], adapter: AdapterRef | None = None, *, max_tokens: int, n: int = 1,
        salt: str = "", has_grammar: bool = False, max_wait_s: float | None = None, key_name: str = "",
    ) -> Asked:  # fmt: skip
        """Submit texts. Those with a grammar, which allows all tokens here, wait for a mask before each token."""
        asked = Asked(prompts, adapter, GenerateParams(max_tokens=max_tokens, n=n, temperature=0.0))
        revision = "" if adapter is None else adapter.revision
        root = PrefixRoot("base", revision, salt, "float32") if self._shares_prefixes else None
        params = cast(GenerateParams, asked.params)
        task = GenerateTask(params, len(prompts), cast(TextHead, TEXT), (END,), 0, root)
        return self._submit(asked, task, key_name, has_grammar=has_grammar, max_wait_s=max_wait_s)

    def embed(
        self, prompts: list[list[int]], adapter: AdapterRef | None = None, *, head: SimulatedHead = LAST,
        key_name: str = "",
    ) -> Asked:  # fmt: skip
        params = EmbedParams()
        task = EmbedTask(params, len(prompts), self.limits, cast(Head, head), normalize=False)
        return self._submit(Asked(prompts, adapter, params), task, key_name)

    def _submit(
        self, asked: Asked, task: Task, key_name: str, *, has_grammar: bool = False, max_wait_s: float | None = None
    ) -> Asked:
        prompts = [np.array(prompt, np.int32) for prompt in asked.prompts]
        asked.request = Request(task, prompts, asked.adapter, asked, key_name=key_name)
        for sequence in asked.request.sequences if has_grammar else ():
            sequence.grammar = cast(TextGrammar, _AnyText())
        check_wait(self.scheduler.queue, max_wait_s, asked.request.sequences, self.now_s)
        self.scheduler.queue.add(asked.request.sequences)
        self.asked.append(asked)
        return asked

    # Steps

    def step(self, *, fails: bool = False) -> StepPlan | None:
        """Plan a step and launch it. Returns None if none is due."""
        revived = True
        while revived:
            plan = self.scheduler.propose(lambda ref: self.slots.usable(ref) is not None)
            revived = self._start_loads(plan)
        if not plan.is_due or (self.in_flight and (not plan.computes or len(self.in_flight) == self.depth)):
            return None
        self._release_slots(plan.cancelled)
        for sequence in (part.sequence for part in plan.parts if not part.sequence.holds_slot):
            sequence.slot = None if sequence.adapter is None else self.slots.acquire(sequence.adapter)
            sequence.holds_slot = True
            sequence.request.start(sequence, None)
        for ref in plan.adapters if plan.computes else ():
            self.slots.acquire(ref)
        self.scheduler.commit(plan, self.now_s)
        if plan.computes:
            for sequence in plan.drawing():
                known = sequence.computed == sequence.length and not sequence.awaits_mask
                assert known or sequence.grammar is None, "a mask depends on a token that is not on the host"
            launched = self.device.launch(plan, [part.sequence.slot for part in plan.parts], fails=fails)
            self.in_flight.append((InFlightStep(plan, launched), fails))
        return plan

    def deliver(self) -> None:
        """Deliver the outputs of the oldest step on the device."""
        step, failed = self.in_flight.popleft()
        for ref in step.plan.adapters:
            self.slots.release(ref)
        if failed:
            self._on_failed_step(step.plan)
            return
        done = step.deliver(0.0, 0.0)
        if step.plan.uses_pages:
            self._drop(done)
            self.scheduler.publish(step.plan)
        else:
            self._release_slots(step.plan.final)
        for sequence in step.bound:
            sequence.awaits_mask = True
            self.masks.append(sequence)
        step.send(self.results)

    def end_mask(self) -> None:
        """Complete the oldest mask."""
        sequence = self.masks.popleft()
        sequence.awaits_mask = False
        self.scheduler.holders.resume(sequence)

    def _on_failed_step(self, plan: StepPlan) -> None:
        sequences = [sequence for sequence, epoch in plan.members() if sequence.epoch == epoch]
        again = [sequence for sequence in sequences if not sequence.solo] if len(sequences) > 1 else []
        for sequence in again:
            sequence.solo = _SOLO_OUTPUTS
        self.scheduler.drop(sequences)
        self._release_slots(() if again else sequences)
        self.scheduler.retry(again)
        for sequence in () if again else sequences:
            sequence.request.fail(InternalError("failed"))

    def preempt_all(self) -> None:
        self.scheduler.retry([])

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        leaving = list(sequences)
        self.scheduler.drop(leaving)
        self._release_slots(leaving)

    def _release_slots(self, sequences: Iterable[Sequence]) -> None:
        for sequence in [each for each in sequences if each.holds_slot]:
            sequence.holds_slot = False
            if sequence.adapter is not None:
                self.slots.release(sequence.adapter)

    # Adapters

    def _start_loads(self, plan: StepPlan) -> bool:
        """Returns whether a retiring adapter has become usable again."""
        revived = False
        using = {each.adapter for each in plan.sequences if each.adapter is not None}
        for index, ref in enumerate(plan.demand):
            if self.slots.holds(ref):
                revived |= self.slots.revive(ref)
                continue
            place = self.slots.reserve(ref, using.union(plan.demand[:index]))
            if place is None:
                self.slots.retire(plan.demand[:index])
                break
            used = {each.slot for step, _ in self.in_flight for each in step.plan.sequences}
            assert place[0] not in used, "the weights of an adapter are replaced while the device reads them"
            self.device.contents[place[0]] = None
            self.loading.append(ref)
        return revived

    def end_load(self) -> None:
        """Complete the oldest load."""
        ref = self.loading.pop(0)
        self.slots.mark_ready(ref)
        slot = self.slots.usable(ref)
        assert slot is not None
        self.device.contents[slot] = ref

    def load(self, refs: Iterable[AdapterRef]) -> None:
        """Load adapters into slots, by requests that are not among `asked` then."""
        for ref in refs:
            self.embed([[1]], ref)
        self.run(1000)
        self.asked.clear()

    # State

    def sequences(self) -> list[Sequence]:
        """Return the sequences of all requests."""
        return [sequence for asked in self.asked for sequence in asked.request.sequences]

    def check(self) -> None:
        """Check that pages, rows and slots are held by exactly the sequences that use them."""
        integrity_check(self.space.pool, self.scheduler.holders.all)()
        holders = [each for each in self.sequences() if each.row is not None]
        assert len({each.row for each in holders}) == len(holders) == self.space.table.filler - self.space.table.free
        queue = self.scheduler.queue
        assert queue.tokens == sum(each.need.tokens for each in queue)
        assert queue.work == sum(each.work for each in queue)
        assert all(each.work > 0 for each in queue)
        for sequence in self.sequences():
            if sequence.holds_slot and sequence.adapter is not None:
                assert self.slots.holds(sequence.adapter)
            if sequence in queue and len(sequence.ids) > sequence.prompt:
                assert sequence.holds_slot, "it must finish on the revision that it started with"

    def run(self, steps: int) -> None:
        """Go on until nothing waits, in at most this many steps."""
        for _ in range(steps):
            while self.step() is not None:
                pass
            if self.in_flight:
                self.deliver()
            elif self.masks:
                self.end_mask()
            elif self.loading:
                self.end_load()
            elif not self.scheduler.has_waiting():
                return
            else:
                raise AssertionError("requests wait, but no step is due")
        raise AssertionError(f"requests are still waiting after {steps} steps")
