"""Chooses the sequences of the next step and the adapters to load. No clock, no locks, no tensors.

Decoding sequences come first: each computes its last token. Prompts and pieces of prompts follow in the queue's order
(`fair_queue.py`). Beside decodes, their cost is limited (`step_cost.py`), unless a burst starts (`decodes.py`). From
its first piece to its last output, a sequence with pages keeps its row, its pages and its slot. Where pages run out,
the sequence that started last gives its pages back, keeps its slot and waits at its old place in the queue to be
computed again.

A sequence is passed over while its adapter is in no slot. A sequence whose adapter is in a slot, but that does not fit
into a step, is passed over at most `PATIENCE` times; then no later sequence starts before it. Unless flows flood:

- the first ready sequence of the queue is in the next step that has space for it, or waits for others to start with it
  while texts wait for rows (`gathering.py`);
- a ready sequence that needs no pages is overtaken in at most `PATIENCE` steps;
- decodes wait for at most one step in turn, apart from those with a grammar (`masks.py`) or of a flood;
- a sequence that needs pages is not overtaken by one that needs pages;
- the sequence that started first is never preempted, so that it ends;
- on the CPU, a request within its flow's allowance that comes while one other flow floods is in the next step, or in
  the one after, if its head reads all tokens of a prompt, which cannot join a step of the flood's texts;
- with S slots, the first S distinct adapters of the queue are loaded and kept.
"""

from collections.abc import Iterable

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.decodes import commit_decodes, plan_decodes, prompt_budget
from ranklet.replicas.engine.fair_queue import LOOKAHEAD, FairQueue
from ranklet.replicas.engine.flood_rules import FloodRules
from ranklet.replicas.engine.flood_share import FloodShare, IsReady, can_run, flood_share
from ranklet.replicas.engine.gathering import Gathering
from ranklet.replicas.engine.holders import Holders
from ranklet.replicas.engine.kv_space import FreeSpace, KvSpace, Start
from ranklet.replicas.engine.plan import Part, StepPlan
from ranklet.replicas.engine.request import Request
from ranklet.replicas.engine.sequence import PATIENCE, Sequence
from ranklet.replicas.engine.stats import KvCacheState
from ranklet.replicas.engine.step_cost import LEAST_PIECE, PromptBudget, StepCost
from ranklet.replicas.engine.step_sizes import StepSizes


class Scheduler:
    """Plans the steps of one engine.

    Args:
        max_adapters: number of adapters that a step may mix.
        max_demand: number of adapters in `StepPlan.demand`.
        costs: what steps cost.
        decode_slowdown: factor by which prompts may raise the cost of a step of decodes.

    Attributes:
        space: pages and rows; None if the engine keeps no keys and values.
        holders: the sequences with pages.
    """

    def __init__(
        self, *, max_tokens: int, max_sequences: int, max_adapters: int, max_demand: int,
        costs: StepCost = StepCost(), decode_slowdown: float = 1.8,
    ) -> None:  # fmt: skip
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._max_adapters = max_adapters
        self._max_demand = max_demand
        self._costs = costs
        self._slowdown = decode_slowdown
        self.space: KvSpace | None = None
        self._decodes_waited = False  # whether the last step left out the decodes
        self.holders = Holders()
        self.queue = FairQueue(max_tokens, self._cached_pages)
        self._flood_rules = FloodRules(self.queue, max_tokens)
        self._gathering = Gathering()
        self.preemptions = 0

    def _cached_pages(self, hashes: list[bytes]) -> int:
        return 0 if self.space is None else self.space.pool.match(hashes).pages

    def set_sizes(self, sizes: StepSizes) -> None:
        """Set how large the next steps may be."""
        self._flood_rules.set_sizes(sizes)
        self._gathering.is_on = sizes.gathers

    def propose(self, is_ready: IsReady) -> StepPlan:
        """Return the next step, given whether an adapter is in a slot. Changes nothing."""
        plan = StepPlan()
        room = self.space.room() if self.space is not None else FreeSpace(0, 0)
        room.computing |= self.holders.pages_in_work()
        first = next((each for each in self.queue if not each.cancelled), None)
        alone = first is not None and first.runs_alone and can_run(first, is_ready) and not self._decodes_waited
        share = flood_share(self.queue, self.holders, self.space, self._costs, self._flood_rules)
        alone = alone or share.decodes_wait(self.queue, self.holders, self._costs, is_ready)
        if not alone:
            self._plan_decodes(plan, share, room, is_ready)
            if plan.decodes and plan.decodes[0].solo:
                return plan
        limits = self._flood_rules.limits(len(plan.decodes))
        budget = prompt_budget(plan, self.queue, room.rows, self._costs, self._slowdown, self._max_tokens, share)
        adapters = set(self.holders.adapters)
        ready: dict[AdapterRef, bool] = {}
        beyond, blocked = 0, False
        full = len(plan.decodes) >= self._max_sequences or plan.tokens >= limits.most
        plan.cancelled += self.queue.cancelled_texts(share.held_back)
        for sequence in self.queue.without_new_texts(share.held_back):
            if sequence.cancelled:
                plan.cancelled.append(sequence)
                continue
            if sequence in plan.preempted or sequence.awaits_mask:
                continue
            adapter = sequence.adapter
            if adapter is not None and adapter not in ready:
                ready[adapter] = is_ready(adapter)
            if not room.rows and sequence.row is None and sequence.need.keeps_cache:
                continue  # a long queue of texts costs little
            if not full and (share.leaves_out(sequence) or room.lacks_page(sequence)):
                continue  # as do prompts that are known not to fit
            full = full or limits.closes(sequence, plan.tokens - len(plan.decodes))
            waits = sequence.is_new_text and not share.lets_start(sequence)
            if full or waits or (blocked and sequence.row is None) or limits.leaves_out(sequence, plan):
                beyond += 1
                if beyond > LOOKAHEAD:
                    break
            elif adapter is None or ready[adapter] or sequence.holds_slot:
                budget.limit(limits.most_text(sequence), share.prompts(sequence))
                part = self._part(sequence, plan, adapters, room, budget)
                if part is None and budget.is_limited:  # its flow floods, and the rest of the step is of others
                    share.leave_out(sequence)
                    continue
                if part is None:
                    plan.passed.append(sequence)
                    blocked = blocked or (sequence.passed_over >= PATIENCE and not sequence.need.keeps_cache)
                    beyond += budget.tokens < LEAST_PIECE
                    full = budget.is_spent or beyond > LOOKAHEAD
                    continue
                plan.add(part)
                budget.take(part.tokens, part.start, is_text=sequence.need.keeps_cache)
                if adapter is not None:
                    adapters.add(adapter)
                limits.take(sequence)
                share.take(sequence)
                full = len(plan.decodes) + len(plan.parts) == self._max_sequences or plan.tokens >= limits.most
                full = full or bool(sequence.solo) or part.head is None
        texts = 0 if share.flows or room.rows else self.queue.texts
        self._gathering.leave_prompts(plan, budget, self.holders, texts)
        plan.cost = share.cost_of(plan, budget)
        plan.demand = list(ready)[: self._max_demand]
        if alone and not plan.parts:  # it waits for pages that others hold
            self._plan_decodes(plan, share, room, is_ready)
        return plan

    def _plan_decodes(self, plan: StepPlan, share: FloodShare, room: FreeSpace, is_ready: IsReady) -> None:
        if self.space is not None:
            give_way = share.victims(self.queue, self.holders, self.space, room, is_ready)
            plan_decodes(plan, self.holders, self.space, room, give_way)

    def _part(
        self, sequence: Sequence, plan: StepPlan, adapters: set[AdapterRef], room: FreeSpace, budget: PromptBudget
    ) -> Part | None:
        """Return the tokens of a sequence that fit into the step; None if it does not fit."""
        if (plan.parts or plan.decodes) and (sequence.solo or (plan.parts and plan.parts[0].sequence.solo)):
            return None
        if not sequence.need.divisible and self.space is not None and plan.uses_pages:
            return None  # the head reads all tokens of a prompt: it runs in steps without pages
        if plan.has_whole and (sequence.need.keeps_cache or sequence.row is not None):
            return None
        adapter = sequence.adapter
        if adapter is not None and adapter not in adapters and len(adapters) >= self._max_adapters:
            return None
        start, left, first = sequence.computed, sequence.need.tokens, None
        # Beside decodes, prompts of embeddings use pages too, so that steps have fewer kinds of attention.
        if sequence.row is None and (sequence.need.keeps_cache or plan.decodes):
            first = self._first_pages(sequence, room)
            if first is None and sequence.need.keeps_cache:
                return None
        if first is not None:
            start, left = first.tokens, left - first.tokens
        tokens = self._piece(sequence, left, start, plan, budget)
        if 0 < tokens < left and first is None and sequence.row is None:
            # To be divided, a prompt needs pages.
            if plan.has_whole or (first := self._first_pages(sequence, room)) is None:
                return None
            start, left = first.tokens, left - first.tokens
            tokens = self._piece(sequence, left, start, plan, budget)
        if not tokens:
            return None
        if first is not None:
            room.pages -= first.pages
            room.rows -= 1
            if first.next_page is not None:
                room.computing.add(first.next_page)
        head = sequence.need.head if tokens == left else None
        return Part(sequence, sequence.epoch, start, tokens, head, first is not None or sequence.row is not None)

    def _first_pages(self, sequence: Sequence, room: FreeSpace) -> Start | None:
        # Each holder may soon need one page more.
        return None if self.space is None else self.space.find_start(sequence, room, len(self.holders))

    def _piece(self, sequence: Sequence, left: int, start: int, plan: StepPlan, budget: PromptBudget) -> int:
        """Return how many of the `left` tokens fit into the step; 0 if it has no space for a useful number."""
        if sequence.need.divisible and self.space is not None:
            return budget.fit(left, start, is_text=sequence.need.keeps_cache)
        # A prompt that cannot be divided; decodes wait for it once.
        alone = not plan.parts and (not plan.decodes or sequence.passed_over >= PATIENCE)
        return left if left <= budget.tokens or alone else 0

    def commit(self, plan: StepPlan, now_s: float = 0.0) -> None:
        """Make the plan take effect at time `now_s`: its sequences have their slots."""
        self._flood_rules.commit(plan)
        self._gathering.commit(plan)
        self._decodes_waited = plan.computes and not plan.decodes and bool(self.holders.decoding)
        self.drop(plan.cancelled)
        self._preempt(plan.preempted)
        self.queue.serve(plan.parts, now_s)
        # Cached pages are taken before other pages are allocated, which may evict cached ones, and pages of this step
        # are published after all its sequences have started: no sequence reads a page in the step that writes it.
        plan.started = [part.sequence for part in plan.parts if part.uses_pages and part.sequence.row is None]
        if self.space is not None:
            for sequence in plan.started:
                self.space.share(sequence)
        if plan.decodes and self.space is not None:
            commit_decodes(plan, self.holders, self.space)
        for sequence in plan.started:
            self._start(sequence)
        for part in plan.parts:
            self._compute(part, plan)
        for part in plan.parts:
            if part.uses_pages and self.space is not None:
                self.space.publish(part.sequence)
        if plan.decodes:
            for flow, tokens in self.holders.decoding_flows.items():
                self.queue.charge_flow(flow, tokens)
        self.queue.charge(plan.tokens)
        for sequence in plan.passed:
            sequence.passed_over += 1

    def _compute(self, part: Part, plan: StepPlan) -> None:
        sequence = part.sequence
        assert sequence.computed == part.start, "the cache has changed since the plan was made"
        sequence.computed += part.tokens
        if part.uses_pages:
            assert self.space is not None
            assert sequence.row is not None
            self.space.table.lengths[sequence.row] = sequence.computed
        plan.part_rows.append(sequence.row)
        if part.head is not None:
            self._take_output(sequence, plan)
        else:
            sequence.need = sequence.need._replace(tokens=sequence.length - sequence.computed)
            self.queue.requeue(sequence, self._costs.piece(part.tokens, part.start))

    def _start(self, sequence: Sequence) -> None:
        assert self.space is not None
        self.space.start(sequence)
        self.holders.add(sequence)
        if sequence.computed < sequence.expected_cached:  # pages were evicted, or who computes them comes later
            self.queue.charge_flow(sequence.flow, sequence.expected_cached - sequence.computed)

    def _take_output(self, sequence: Sequence, plan: StepPlan) -> None:
        sequence.left -= 1
        if sequence.left:
            self.holders.start_decoding(sequence)
            if sequence.grammar is not None:
                self.holders.pause(sequence)
        else:
            plan.final.append(sequence)
            self.holders.stop_decoding(sequence)

    def _preempt(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.drop([sequence])
            sequence.request.restart(sequence)
            self.queue.restore(sequence)
            self.preemptions += 1

    def retry(self, sequences: Iterable[Sequence]) -> None:
        """Put the sequences of a failed step, which were dropped, at the front of the queue.

        The failed step may have written wrong keys and values into pages, which others share. Therefore no page is
        shared any more, and then all sequences with pages are preempted: they expect none in the cache.
        """
        if self.space is not None:
            self.space.forget()
        self._preempt(self.holders.undelivered())
        again = list(sequences)
        for sequence in again:
            sequence.request.restart(sequence)
        self.queue.put_back(again)

    def publish(self, plan: StepPlan) -> None:
        """Let later sequences share the pages that the delivered tokens of a step have filled."""
        for sequence in plan.decodes:
            if self.space is not None and sequence.length % PAGE_TOKENS == 1 and sequence.row is not None:
                self.space.publish(sequence)

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """Remove sequences and free their pages. Outputs of launched steps are void."""
        leaving = list(sequences)
        self.queue.remove([each for each in leaving if each in self.queue])
        for sequence in leaving:
            sequence.void()
            if sequence in self.holders:
                assert self.space is not None
                self.holders.remove(sequence)
                self.space.release(sequence)

    def take_waiting(self, adapter: AdapterRef) -> list[Request]:
        """Remove the queued sequences of an adapter that wait for its slot. Returns their requests."""
        lost = [sequence for sequence in self.queue if sequence.adapter == adapter and not sequence.holds_slot]
        self.drop(lost)
        return list(dict.fromkeys(sequence.request for sequence in lost))

    def kv_state(self) -> KvCacheState | None:
        return None if self.space is None else self.space.state(len(self.holders), self.preemptions)

    def waiting(self) -> list[Sequence]:
        """Return the sequences that need another pass."""
        return [*self.queue, *self.holders.decoding]

    def has_waiting(self) -> bool:
        return len(self.queue) > 0 or bool(self.holders.decoding)
