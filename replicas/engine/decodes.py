"""Plans and commits the decodes of a step: who gives up pages for them, and what prompts may cost beside them."""

from collections.abc import Sequence as Many

from ranklet.replicas.engine.decode_set import DecodeSet
from ranklet.replicas.engine.fair_queue import FairQueue
from ranklet.replicas.engine.flood_share import FloodShare
from ranklet.replicas.engine.holders import Holders
from ranklet.replicas.engine.kv_space import FreeSpace, KvSpace
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.step_cost import MOST_TEXT_TOKENS, PromptBudget, StepCost

_BURST = 0.05  # texts that can start, as a share of those that decode
_BURST_TEXTS = 4  # that a step starts at least
_BURST_COST = 2  # of the prompts of a burst at most, compared with a full step of tokens that have none before them
_LEAST_TOKENS = 256  # of prompts beside few decodes


def plan_decodes(
    plan: StepPlan, holders: Holders, space: KvSpace, room: FreeSpace, give_way: Many[Sequence] = ()
) -> None:
    """Add every decoding sequence to a plan. Out of pages, the sequence that started last is preempted instead.

    A sequence that runs alone, because a step with it failed, is the plan's only decode.

    Args:
        give_way: sequences to preempt in any case.
    """
    decode_set = holders.decode_set()
    if not give_way and not any(each.cancelled or each.solo for each in decode_set.sequences):
        growing = len(space.table.full(decode_set.rows))
        if growing <= room.pages:
            room.pages -= growing
            plan.decode(decode_set)
            return
    solo = next((each for each in decode_set.sequences if each.solo and not each.cancelled), None)
    victims, preempted, kept = holders.preemptible(), set(give_way), list[Sequence]()
    victims = [each for each in victims if each not in preempted]
    room.pages += sum(map(space.freed_by, give_way))
    # In the order in which they started, so that a victim is never in the plan already.
    for sequence in decode_set.sequences if solo is None else [solo]:
        if sequence.cancelled:
            plan.cancelled.append(sequence)
            continue
        if space.needs_page(sequence) and sequence not in preempted:
            while not room.pages and sequence not in preempted:
                victim = victims.pop()
                preempted.add(victim)
                room.pages += space.freed_by(victim)
            if sequence not in preempted:
                room.pages -= 1
        if sequence not in preempted:
            kept.append(sequence)
    plan.decode(DecodeSet.of(kept))
    if preempted:
        plan.preempted = [each for each in holders.all if each in preempted]
        room.rows = 0  # nothing starts in pages that were just taken away


def commit_decodes(plan: StepPlan, holders: Holders, space: KvSpace) -> None:
    """Count the token that each decode computes, and give it a page for that token."""
    decodes, rows = plan.decodes, plan.decode_set.rows
    for index in space.table.full(rows):
        space.extend(decodes[index])
    space.table.lengths[rows] += 1
    for sequence in decodes:
        sequence.computed += 1
        sequence.left -= 1
        if sequence.grammar is not None:
            holders.pause(sequence)
    plan.final = [each for each in decodes if not each.left]
    for sequence in plan.final:
        holders.stop_decoding(sequence)


def prompt_budget(
    plan: StepPlan, queue: FairQueue, rows: int, costs: StepCost, slowdown: float, max_tokens: int,
    share: FloodShare,
) -> PromptBudget:  # fmt: skip
    """Return what prompts may take in a step whose decodes are planned.

    Beside decodes, the step may cost `slowdown` times as much as without prompts. Beside few decodes, which cost
    little, it may cost more. A burst may take a full step.

    Args:
        rows: number of sequences that can start.
        share: of flooding flows.
    """
    count = len(plan.decodes)
    if count:
        max_tokens = min(max_tokens, MOST_TEXT_TOKENS)
    budget = PromptBudget(costs, max_tokens - plan.tokens, decodes=count)
    if count and (len(queue) or share.flows):
        alone = budget.decodes_cost = costs.decodes(count, sum(each.computed for each in plan.decodes))
        budget.cost = max((slowdown - 1) * alone - costs.mixed, (slowdown - 1) * _LEAST_TOKENS)
        texts = queue.texts - sum(map(queue.new_texts_of, share.held_back))
        if _is_burst(queue, count, min(texts, rows), costs, max_tokens):
            budget.cost = max(budget.cost, _BURST_COST * max_tokens)
    share.plan_prompts(plan, budget)
    return budget


def _is_burst(queue: FairQueue, decodes: int, can_start: int, costs: StepCost, max_tokens: int) -> bool:
    """Return whether many texts can start, compared with the number of decodes that a large step delays.

    In many small steps, the prompts of a burst would wait, and rows would stay empty. A large step of less than some
    long prompts would delay all running texts and start few.
    """
    if can_start < max(_BURST * decodes, _BURST_TEXTS):
        return False
    return max_tokens >= _BURST_TEXTS * costs.piece(queue.text_work / queue.texts, 0)
