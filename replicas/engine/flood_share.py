"""What flooding flows may take of an engine that generates text, while others use it too. No clock.

Each text lengthens the steps of all others, and holds its row and its pages for long. So while flows within their
allowance have requests, flooding flows fill steps only until these make most of the tokens a second that the largest
steps would make; from there on, steps become much longer and hardly faster. Beyond that, each flooding flow has its
equal part. Texts of a flooding flow beyond its part give way to texts of others that wait for a row or pages.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import pages_of
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.flood_rules import FloodRules
from ranklet.replicas.engine.holders import Holders
from ranklet.replicas.engine.kv_space import FreeSpace, KvSpace
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.sequence import Flow, Sequence
from ranklet.replicas.engine.step_cost import PromptBudget, StepCost

IsReady = Callable[[AdapterRef], bool]  # whether an adapter is in a slot

_RATE = 0.8  # of the tokens a second with as many texts as fit
_WITH_PROMPTS = 1.4  # cost of a step of those texts, in that of their decodes: as some end, prompts of others begin
_MOST_WAITED = 16  # cost of the steps that decodes of flooding flows wait for, in steps of their own
_LOOKED_AT = 32  # first sequences of others in the queue


@dataclass(slots=True)
class FloodShare:
    """The share of flooding flows in one step, while it is planned.

    Attributes:
        flows: the flooding flows; none if nobody else has requests.
        texts: number of running texts up to which they start more; 0 if the last steps cost enough.
        own: number of texts that each of them may run in any case.
        cost: of a step, up to which their embeddings fill it; 0 if the last steps cost enough.
        text_cost: the same for prompts of their texts.
        each: part of one flow.
        running: texts that run or start.
        by_flow: the same, by flow.
        decodes: cost of the step's decodes; 0 without any.
        waited: cost of the steps since the last one with decodes.
        too_large: work of the smallest of their sequences that did not fit into their part, by whether it is a text.
    """

    flows: frozenset[Flow] = frozenset()
    texts: int = 0
    own: int = 0
    cost: float = 0.0
    text_cost: float = 0.0
    each: float = 1.0
    running: int = 0
    by_flow: Counter[Flow] = field(default_factory=Counter)
    decodes: float = 0.0
    waited: float = 0.0
    too_large: dict[bool, int] = field(default_factory=dict)

    def lets_start(self, sequence: Sequence) -> bool:
        """Return whether a text that waits may start."""
        flow = sequence.flow
        return flow not in self.flows or self.running < self.texts or self.by_flow[flow] < self.own

    @property
    def held_back(self) -> list[Flow]:
        """Return the flows none of whose texts may start now."""
        if self.running < self.texts:
            return []
        return [flow for flow in self.flows if self.by_flow[flow] >= self.own]

    def take(self, sequence: Sequence) -> None:
        """Count a sequence of the step."""
        if sequence.is_new_text:
            self.running += 1
            self.by_flow[sequence.flow] += 1

    def plan_prompts(self, plan: StepPlan, budget: PromptBudget) -> None:
        """Take note of the decodes. If all are of flooding flows, they do not limit the prompts of others."""
        if self.flows and plan.decodes:
            self.decodes = budget.decodes_cost
            if self._floods_all({each.flow for each in plan.decodes}):
                budget.cost = inf

    def prompts(self, sequence: Sequence) -> float | None:
        """Return what the prompts of the step may cost with this sequence; None for no limit."""
        if sequence.flow not in self.flows or not self.decodes:
            return None
        cost = self.text_cost if sequence.need.outputs > 1 else self.cost
        return max(cost - self.decodes, self.each * len(self.flows) * self.decodes)

    def leave_out(self, sequence: Sequence) -> None:
        """Take note of a sequence of a flooding flow that did not fit."""
        if sequence.row is None:
            kind = sequence.need.outputs > 1
            self.too_large[kind] = min(self.too_large.get(kind, sequence.work), sequence.work)

    def leaves_out(self, sequence: Sequence) -> bool:
        """Return whether a sequence fits no better than one that did not."""
        if not self.too_large or sequence.row is not None or sequence.flow not in self.flows:
            return False
        return sequence.work >= self.too_large.get(sequence.need.outputs > 1, inf)

    def cost_of(self, plan: StepPlan, budget: PromptBudget) -> float | None:
        """Return the cost of a plan; None without flooding flows."""
        if not self.flows or not plan.computes:
            return None
        mixed = budget.costs.mixed if plan.decodes and plan.parts else 0.0
        return (self.decodes or budget.costs.step) + mixed + budget.spent

    def decodes_wait(self, queue: FairQueue, holders: Holders, costs: StepCost, is_ready: IsReady) -> bool:
        """Return whether the decodes, all of flooding flows, wait for a step of others."""
        decodes = len(holders.decoding)
        if not self.flows or not decodes or not self._floods_all(holders.decoding_flows):
            return False
        cost = costs.decodes(decodes, sum(each.computed for each in holders.decoding))
        return self.waited < min(1 / self.each - 1, _MOST_WAITED) * cost and any(
            not each.cancelled and can_run(each, is_ready) for each in self._others(queue)
        )

    def victims(
        self, queue: FairQueue, holders: Holders, space: KvSpace, room: FreeSpace,
        is_ready: IsReady,
    ) -> list[Sequence]:  # fmt: skip
        """Return texts of flooding flows to preempt, so that texts of others that wait can start next."""
        rows, pages = 0, len(holders)
        for sequence in self._others(queue) if self.flows else ():
            if sequence.is_new_text and not sequence.cancelled and can_run(sequence, is_ready):
                rows += 1
                pages += pages_of(sequence.length) + 1
        found: list[Sequence] = []
        if not rows:
            return found
        left, free_rows, free_pages = self.by_flow.copy(), room.rows, room.pages
        for sequence in reversed(holders.preemptible()):
            if rows <= free_rows and pages <= free_pages:
                break
            if sequence.flow in self.flows and left[sequence.flow] > self.own:
                found.append(sequence)
                left[sequence.flow] -= 1
                free_rows += 1
                free_pages += space.freed_by(sequence)
        return found

    def _others(self, queue: FairQueue) -> Iterable[Sequence]:
        return islice(queue.of_others(self.flows), _LOOKED_AT)

    def _floods_all(self, flows: Iterable[Flow]) -> bool:
        return self.flows.issuperset(flows)


def flood_share(
    queue: FairQueue, holders: Holders, space: KvSpace | None, costs: StepCost, rules: FloodRules
) -> FloodShare:
    """Return the share of flooding flows in the next step. Without pages, `FloodRules` alone limits them."""
    flooding = queue.flooding(running=holders.flows) if space is not None else set[Flow]()
    flows = {*holders.flows, *queue.flows} if flooding else flooding
    flooding &= flows  # those that had requests may have none any more
    if space is None or not flooding or (flooding.issuperset(flows) and not rules.expects_others):
        return FloodShare()
    running = len(holders)
    context = sum(each.computed for each in holders.all) / running if running else 0.0
    texts = brief_texts(costs, min(space.table.filler, _fitting(space, running)), context)
    own, cost = max(1, texts // len(flows)), costs.decodes(texts, texts * context) if texts else costs.step
    text_cost = _WITH_PROMPTS * cost
    if rules.mean_cost > cost:
        cost = 0.0
    if rules.mean_cost > text_cost:
        texts, text_cost = 0, 0.0
    each, by_flow, waited = 1 / len(flows), holders.flows.copy(), rules.waited_cost
    return FloodShare(frozenset(flooding), texts, own, cost, text_cost, each, running, by_flow, waited=waited)


def brief_texts(costs: StepCost, rows: int, context: float) -> int:
    """Return how many texts make most of the tokens a second that `rows` texts make."""
    each = costs.decodes(1, context) - costs.step
    return int(_RATE * rows * costs.step / (costs.step + (1 - _RATE) * each * rows)) if costs.step else 0


def _fitting(space: KvSpace, running: int) -> int:
    """Return how many sequences of the present size the pages hold."""
    pool = space.pool
    return pool.count * running // pool.used if running and pool.used else space.table.filler


def can_run(sequence: Sequence, is_ready: IsReady) -> bool:
    """Return whether a sequence's adapter is in a slot."""
    return sequence.adapter is None or sequence.holds_slot or is_ready(sequence.adapter)
