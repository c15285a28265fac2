"""The sequences that wait for one engine, in an order in which no flow crowds out the others.

A flow is what one API key sends to one adapter. All flows have equal shares, whether of one adapter or of several. The
order is that of arrival as long as no flow has more than an allowance of tokens waiting. Requests beyond a flow's
allowance are ordered by when their last sequence would start if the flows were served in turn, token for token: fair
queueing with the virtual time of WF2Q+ (Bennett and Zhang, 1997). So requests stay whole, and short ones need not wait
for long ones of other flows.

The cost of a sequence is its work: the tokens that it has to compute, without those that it is expected to find in the
prefix cache. Tokens of decodes, which do not wait here, count towards their flow's turn and allowance too
(`charge_flow`).
"""

from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from heapq import merge
from itertools import count, islice
from math import inf
from operator import attrgetter

from ranklet.replicas.engine.backlog import Backlog
from ranklet.replicas.engine.plan import Part
from ranklet.replicas.engine.queued_pages import QueuedPages
from ranklet.replicas.engine.sequence import Flow, Sequence

_ACTIVE_ALLOWANCES = 16  # a flow without requests stays active until this many allowances have been served
_MOST_ACTIVE = 4096  # flows, beyond which the oldest without requests are not active any more
LOOKAHEAD = 512  # waiting sequences examined that are in no plan
_TURN = attrgetter("turn")
_Lane = tuple[Flow, bool]  # flow, and whether the sequences are new texts


@dataclass(slots=True)
class _Queued:
    """Waiting sequences of one flow."""

    sequences: int = 0
    tokens: int = 0
    work: int = 0
    last: float = -inf  # turn of the newest sequence


class FairQueue:
    """Waiting sequences in the order in which they are served.

    Args:
        cached: see `QueuedPages`.

    Attributes:
        allowance: work that a flow may have waiting before its further requests are ordered by virtual time.
        tokens: all waiting tokens.
        work: those of them that are not expected in the prefix cache.
        texts: number of waiting sequences that keep keys and values.
        text_work: work of these sequences.
    """

    def __init__(self, allowance: int, cached: Callable[[list[bytes]], int] = lambda hashes: 0) -> None:
        self.allowance = allowance
        self._ordered: list[Sequence] = []
        self._lanes: defaultdict[_Lane, list[Sequence]] = defaultdict(list)  # parts of `_ordered`
        self._backlogs: defaultdict[_Lane, Backlog] = defaultdict(Backlog)
        self._all_backlogs = {is_new: Backlog() for is_new in (False, True)}  # of all lanes of a kind
        self._flows: dict[Flow, _Queued] = {}
        self._arrivals = count()
        self._now = 0.0  # virtual time: tokens that each active flow should have been served by now
        self._served = 0  # tokens of all steps
        self._active: OrderedDict[Flow, int] = OrderedDict()  # flows: `_served` at their last request
        self._charged: dict[Flow, float] = {}  # flows: virtual time that `charge_flow` has used up
        self._pages = QueuedPages(cached)
        self.tokens = self.work = self.texts = self.text_work = 0

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._ordered)

    def without_new_texts(self, flows: Collection[Flow]) -> Iterable[Sequence]:
        """Return the sequences in order, without new texts of these flows."""
        if not flows:
            return self._ordered
        lanes = (lane for (flow, is_new), lane in self._lanes.items() if not is_new or flow not in flows)
        return merge(*lanes, key=_TURN)

    def cancelled_texts(self, flows: Iterable[Flow]) -> list[Sequence]:
        """Return cancelled ones of the first new texts of these flows."""
        lanes = (self._lanes.get((flow, True), ()) for flow in flows)
        return [each for lane in lanes for each in islice(lane, LOOKAHEAD) if each.cancelled]

    def of_others(self, flows: Collection[Flow]) -> Iterable[Sequence]:
        """Return the sequences of all but these flows, in order."""
        return merge(*(lane for (flow, _), lane in self._lanes.items() if flow not in flows), key=_TURN)

    def __contains__(self, sequence: object) -> bool:
        assert isinstance(sequence, Sequence)
        at = bisect_left(self._ordered, sequence.turn, key=_TURN)
        return at < len(self._ordered) and self._ordered[at] is sequence

    @property
    def flows(self) -> Iterable[Flow]:
        """The flows with waiting sequences."""
        return self._flows

    def flooding(self, comes: Flow | None = None, running: Mapping[Flow, int] | None = None) -> set[Flow]:
        """Return the flows that have more than their allowance waiting, or were served that much ahead of others.

        The second ones flood only while others wait, or if most texts are their own: else they use what others leave.

        Args:
            comes: a flow that is about to wait too.
            running: number of running texts by flow.
        """
        allowed = self.allowance
        found = {name for name, flow in self._flows.items() if flow.work > allowed}
        ahead = {name for name, until in self._charged.items() if until - self._now > allowed}
        if not ahead.issuperset(self._flows if comes is None else (*self._flows, comes)):
            return found | ahead
        texts = running or {}
        most = (sum(texts.values()) + self.texts) / 2
        return found.union(flow for flow in ahead if texts.get(flow, 0) + self.new_texts_of(flow) > most)

    def tokens_of(self, flow: Flow) -> int:
        return self._flows[flow].tokens if flow in self._flows else 0

    def new_texts_of(self, flow: Flow) -> int:
        """Return how many new texts of a flow wait."""
        return len(self._lanes.get((flow, True), ()))

    def work_of(self, flow: Flow) -> int:
        return self._flows[flow].work if flow in self._flows else 0

    def work_within(self) -> int:
        """Return the waiting work of flows that are within their allowance."""
        return sum(flow.work for flow in self._flows.values() if flow.work <= self.allowance)

    def floods(self, sequence: Sequence) -> bool:
        """Return whether a sequence's flow has more than its allowance waiting, or had when it arrived.

        The last sequences of a large request flood too: steps that are cut for them would gain nothing.
        """
        return sequence.beyond or self.work_of(sequence.flow) > self.allowance

    def add(self, sequences: Many[Sequence]) -> None:
        """Insert the sequences of a request."""
        name = sequences[0].flow
        flow = self._flows.setdefault(name, _Queued())
        for each in sequences:
            self._pages.enter(each)
        debt, work = self._debt(name), self._work_with(name, sum(each.work for each in sequences))
        ahead = 0 if work <= self.allowance else work - sequences[-1].work
        turn = max(flow.last, self._now + ahead)
        rest = ahead - flow.work - debt if ahead else 0
        for each in sequences:
            self._insert(each, turn)
            each.beyond, each.lead = bool(ahead), max(0.0, rest)
            rest -= each.work
        self._mark_active(name)

    def _debt(self, flow: Flow) -> float:
        """Return the tokens charged to a flow ahead of the others."""
        return max(0.0, self._charged.get(flow, self._now) - self._now)

    def _work_with(self, flow: Flow, work: int) -> float:
        """Return the work of a flow that counts towards its allowance once a request is added."""
        return self.work_of(flow) + self._debt(flow) + work

    def wait_s(self, sequences: Many[Sequence], now_s: float, measured_s: float) -> float:
        """Return how long a new request will wait for what waits now; 0 if the rates are not known.

        Beyond its flow's allowance, it waits for its flow's earlier requests. Within the allowance, or without such
        requests, it waits for those of all flows within theirs, but not for a flood.

        Args:
            measured_s: time for which a rate must have been measured.
        """
        own = _lane(sequences[0])
        if own in self._backlogs and self._work_with(own[0], self._pages.work_of(sequences)) > self.allowance:
            return self._backlogs[own].wait_s(now_s, measured_s)
        backlog, flooding = self._all_backlogs[own[1]], self.flooding(own[0])
        wait_s = backlog.wait_s(now_s, measured_s)
        if not wait_s or not flooding:
            return wait_s
        floods = sum(self._backlogs[lane].work for lane in self._backlogs if lane[1] == own[1] and lane[0] in flooding)
        return wait_s * (1 - floods / backlog.work)

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Insert sequences of a failed step at the front, in this order."""
        for sequence in sequences:
            self._put(sequence, -inf)

    def restore(self, sequence: Sequence) -> None:
        """Insert a sequence at the place that it had before it was removed."""
        self._put(sequence, *sequence.turn)

    def requeue(self, sequence: Sequence, cost: float) -> None:
        """Insert the rest of a sequence, whose turn goes on from the one that it had.

        Args:
            cost: of the part that is in a step, in tokens without others before them.
        """
        turn = max(sequence.turn[0], self._now - self.allowance) + cost
        sequence.lead = 0.0
        self._put(sequence, turn)

    def _put(self, sequence: Sequence, turn: float, arrival: int | None = None) -> None:
        self._pages.enter(sequence)
        self._insert(sequence, turn, arrival)

    def _insert(self, sequence: Sequence, turn: float, arrival: int | None = None) -> None:
        sequence.turn = turn, next(self._arrivals) if arrival is None else arrival
        flow = self._flows.setdefault(sequence.flow, _Queued())
        flow.last = max(flow.last, turn)
        self._count(sequence, flow, 1)
        insort(self._ordered, sequence, key=_TURN)
        insort(self._lanes[_lane(sequence)], sequence, key=_TURN)

    def _count(self, sequence: Sequence, flow: _Queued, sign: int) -> None:
        """Add a sequence to the sums, or take it from them."""
        tokens, work = sign * sequence.need.tokens, sign * sequence.work
        flow.sequences += sign
        flow.tokens += tokens
        flow.work += work
        self.tokens += tokens
        self.work += work
        if sequence.need.keeps_cache:
            self.texts += sign
            self.text_work += work
        lane = _lane(sequence)
        for backlog in (self._backlogs[lane], self._all_backlogs[lane[1]]):
            backlog.work += sign if lane[1] else work

    def serve(self, parts: Many[Part], now_s: float) -> None:
        """Remove the sequences of a step, and measure how fast steps serve them."""
        served: Counter[_Lane] = Counter()
        for part in parts:
            lane = _lane(part.sequence)
            served[lane] += 1 if lane[1] else part.tokens
        backlogs = [(self._backlogs[lane], work) for lane, work in served.items()]
        self.remove([part.sequence for part in parts])
        for is_new, backlog in self._all_backlogs.items():
            backlogs.append((backlog, sum(work for lane, work in served.items() if lane[1] == is_new)))
        for backlog, work in backlogs:
            if work:
                backlog.on_served(work, now_s)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            lane = _lane(sequence)
            for ordered in (self._ordered, self._lanes[lane]):
                at = bisect_left(ordered, sequence.turn, key=_TURN)
                assert ordered[at] is sequence
                del ordered[at]
            flow = self._flows[sequence.flow]
            self._count(sequence, flow, -1)
            self._pages.leave(sequence)
            if not self._lanes[lane]:
                del self._lanes[lane], self._backlogs[lane]
            if not flow.sequences:
                del self._flows[sequence.flow]

    def charge_flow(self, flow: Flow, tokens: int) -> None:
        """Count tokens towards a flow's turn that it did not have in the queue: those of its decodes, for example."""
        self._charged[flow] = max(self._charged.get(flow, self._now), self._now) + tokens
        self._mark_active(flow)

    def _mark_active(self, flow: Flow) -> None:
        self._active[flow] = self._served
        self._active.move_to_end(flow)

    def charge(self, tokens: int) -> None:
        """Advance virtual time by the tokens of a step, after its sequences were removed."""
        self._now += tokens / max(self.active_flows, 1)
        self._served += tokens
        self._expire_active()
        if self._ordered:  # tokens that a flow took from an idle device count later only up to one allowance
            first = self._ordered[0]
            self._now = max(self._now, first.turn[0] - first.lead - self.allowance)

    @property
    def active_flows(self) -> int:
        """Number of flows among which virtual time divides what is served."""
        return len(self._active)

    def _expire_active(self) -> None:
        for _ in range(len(self._active) - _MOST_ACTIVE):
            self._expire(next(iter(self._active)))
        while self._active:
            flow, last = next(iter(self._active.items()))
            if last > self._served - _ACTIVE_ALLOWANCES * self.allowance:
                return
            self._expire(flow)

    def _expire(self, flow: Flow) -> None:
        """Forget a flow, unless it has requests."""
        if flow in self._flows:
            self._mark_active(flow)
        else:
            del self._active[flow]
            self._charged.pop(flow, None)


def _lane(sequence: Sequence) -> _Lane:
    return sequence.flow, sequence.is_new_text
