"""Chooses the replica with the least cost for each request. No Ray.

The cost of a replica, in seconds, is the wait expected there, the load of the adapter (none if it is in a slot, more if
another adapter must be evicted), and the work that padding to the pool's rank adds. An adapter has as many homes as its
traffic needs. Its requests go to other replicas only if that saves time. See NOTES.md.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from random import Random

import numpy as np

from ranklet.routing import rendezvous
from ranklet.routing.costs import ORDER_STEP_S, AdapterCosts, CostTable
from ranklet.routing.demand import Demand
from ranklet.routing.fleet import Fleet, Member, Vector
from ranklet.routing.hint import PrefetchOrder, RoutingHint, TextHint
from ranklet.routing.homes import HomeSize
from ranklet.routing.policy import SHORTLIST, Choice, Policy
from ranklet.routing.report import NEWS_INTERVAL_S, QueueLoad, StateReport
from ranklet.routing.text_costs import TextCost, TextCosts
from ranklet.routing.view import ReplicaView

_MAX_ORDERS = 1024
_OVERSIZE_COST_S = 1e5  # of a replica whose pool's rank is less than the adapter's
_DEMAND_INTERVAL_S = 1.0  # between two looks at the demand for all adapters
_FRESH_S = 0.001  # younger reports count as current
_MAX_SORTED = 256  # up to this many replicas, sorting is faster than partitioning
_TIE_COSTS = 4096  # random numbers drawn at once and used repeatedly


class Affinity:
    """The choices of one router. Thread-safe: reports and requests come on different threads.

    Args:
        clock: seconds of a monotonic clock, for every time in this class.
        seed: of the random costs that break ties.
    """

    def __init__(
        self, policy: Policy = Policy(), fleet: Fleet | None = None, *, clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self._policy = policy
        self._fleet = Fleet() if fleet is None else fleet
        self._clock = clock
        self._lock = threading.Lock()
        self._costs = CostTable(self._fleet, policy)
        self._texts = TextCosts(self._fleet)
        self._home_size = HomeSize(self._fleet)
        self._demand_checked_s = -math.inf
        self._random = Random(seed).random
        self._tie_random = np.random.default_rng(seed)
        self._tie_costs: Vector = np.zeros(0)
        self._orders: deque[PrefetchOrder] = deque(maxlen=_MAX_ORDERS)

    def set_policy(self, policy: Policy) -> None:
        with self._lock:
            self._policy = policy
            self._costs.set_policy(policy)
            self._tie_costs = np.zeros(0)

    def set_members(self, members: Iterable[Member]) -> None:
        """Replace the replicas. `Choice.order` contains indices into them."""
        with self._lock:
            generation = self._fleet.generation
            self._fleet.set_members(members, self._clock())
            if self._fleet.generation != generation:
                self._texts.set_members()

    def set_gateways(self, gateways: int, gateway_index: int) -> None:
        with self._lock:
            self._fleet.set_gateways(gateways, gateway_index)

    # Requests

    def route(self, hint: RoutingHint) -> Choice:
        """Choose replicas for a call and count its work at the best one, until `complete`."""
        with self._lock:
            now_s = self._clock()
            text = self._text_cost(hint.text, hint.work)
            choice = self._choose(hint.adapter, hint.work, now_s, 0, hint.avoid, text)
            if hint.work and choice.order:
                self._send(hint, choice.order[0], text, now_s)
            if hint.adapter is not None:
                self._orders.extend(PrefetchOrder(each, hint.adapter, hint.location) for each in choice.prefetch)
            return choice

    def _text_cost(self, hint: TextHint | None, tokens: float) -> TextCost | None:
        return self._texts.cost(hint, tokens, self._policy) if hint is not None and len(self._fleet) else None

    def _send(self, hint: RoutingHint, i: int, text: TextCost | None, now_s: float) -> None:
        if hint.text is None or text is None:
            self._fleet.add_request(hint.id, i, hint.work, now_s)
            return
        uncached = float(text.uncached[i])
        work = self._texts.work(hint.text, uncached, self._policy)
        if self._fleet.add_request(hint.id, i, work, now_s, told=hint.work):
            self._texts.add(hint.id, hint.text, i, hint.work - uncached, now_s)

    def choose(
        self, adapter: str | None, work: float, *, rank: int = 0, avoid: str | None = None,
        text: TextHint | None = None,
    ) -> Choice:  # fmt: skip
        """Choose replicas for a request without counting its work. Without replicas, the order is empty.

        Args:
            adapter: None for the base model.
            work: in prefill-equivalent tokens.
            rank: of the adapter, 0 if unknown.
            avoid: id of the replica that has just failed this request; it comes last.
            text: None if the request makes no text.
        """
        with self._lock:
            return self._choose(adapter, work, self._clock(), rank, avoid, self._text_cost(text, work))

    def reassign(self, hint: RoutingHint, replica: str) -> None:
        """Count a routed request at the replica that has accepted it, if that is not the best one of its choice."""
        with self._lock:
            i = self._fleet.index.get(replica)
            if i is not None and self._fleet.replica_of(hint.id) not in (None, replica):
                self._send(hint, i, self._text_cost(hint.text, hint.work), self._clock())

    def begin(self, request: int) -> None:
        """Note the first token of a text: its prompt delays no others any more."""
        with self._lock:
            self._fleet.begin_request(request)

    def complete(
        self, request: int, replica: str | None = None, load: QueueLoad | None = None, age_s: float = 0.0,
        cached_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Remove a request that was answered or has failed.

        Args:
            replica: id of the replica that has answered, None if none has.
            load: of that replica, with its answer.
            age_s: age of `load`.
            cached_tokens: of a text's prompt, which the replica found in its cache.
        """
        with self._lock:
            now_s = self._clock()
            self._fleet.complete_request(request, arrived=replica is not None)
            self._texts.complete(request, replica, cached_tokens)
            if replica is not None:
                self._fleet.mark_alive(replica, now_s)
                if load is not None:
                    self._fleet.update_load(replica, load, now_s, age_s)

    def replica_of(self, request: int) -> str | None:
        with self._lock:
            return self._fleet.replica_of(request)

    def stranded(self, requests: Iterable[int]) -> Mapping[int, str | None]:
        """Return requests that no replica works on, with the id of their hung replica, None without any replica."""
        with self._lock:
            hung, empty = self._fleet.hung_replicas(self._clock()), not len(self._fleet)
            if not hung and not empty:
                return {}
            sent = {request: self._fleet.replica_of(request) for request in requests}
        return {id: replica for id, replica in sent.items() if (empty if replica is None else replica in hung)}

    def pop_prefetch_orders(self) -> list[PrefetchOrder]:
        """Return the prefetch orders of `route` since the last call, the latest 1024 at most."""
        with self._lock:
            orders = list(self._orders)
            self._orders.clear()
            return orders

    # Reports

    def on_report(self, report: StateReport, gateway: str, age_s: float = 0.0) -> None:
        """Handle a replica's state report.

        Args:
            gateway: id under which this process sends its requests.
            age_s: age of the report.
        """
        with self._lock:
            now_s, fleet = self._clock(), self._fleet
            if gateway in report.gateways:
                fleet.set_gateways(len(report.gateways), report.gateways.index(gateway))
            received = report.received_work.get(gateway, 0)
            fleet.update_load(report.replica, replace(report.load, received_work=received), now_s, age_s)
            fleet.mark_alive(report.replica, now_s)
            self._costs.update(fleet.update_holdings(report.replica, report.holdings))
            self._texts.on_report(report, now_s, age_s)

    def members(self) -> tuple[Member, ...]:
        """Return the live replicas: the same tuple until one starts or ends."""
        return self._fleet.members

    def views(self) -> list[ReplicaView]:
        with self._lock:
            return self._fleet.views(self._clock())

    # The choice

    def _choose(
        self, adapter: str | None, work: float, now_s: float, rank: int, avoid: str | None, text: TextCost | None
    ) -> Choice:
        fleet, policy = self._fleet, self._policy
        count = len(fleet)
        if not count:
            return Choice(())
        if self._costs.is_stale(now_s):
            self._refresh(now_s)
        wait = fleet.waits(now_s)
        if fleet.texts.known:
            wait += policy.running_text_share * fleet.texts.running_s
        avoided = fleet.index.get(avoid, -1) if avoid else -1
        if not adapter:
            other = self._other((~fleet.own).astype(np.float64), text)
            cost = wait + self._ties(count) + policy.other_router_cost_s * other
            return Choice(_best(cost if text is None else cost + text.cost, avoided))
        demand = self._home_size.demand(adapter)
        demand.add_request(max(work if text is None else text.work, 1), now_s)
        needed, before = demand.work_per_s(now_s) / self._home_size.work_per_s, demand.homes
        homes = demand.update_homes(needed, count, now_s, shrink_at_once=self._costs.tight > 0)
        costs = self._costs.get(adapter, homes)
        order = _best(self._total_cost(costs, wait, rank, work, text), avoided)
        best = order[0]
        hit = fleet.placement.places(adapter).get(best, False)
        spill = None if costs.place[best] < homes else _spill(costs, avoided)
        prefetch: list[int] = []
        if homes > before:
            prefetch = np.flatnonzero((costs.place < homes) & costs.absent).tolist()
        elif wait[best] > policy.prefetch_wait_s and now_s - costs.prefetched_s > policy.prefetch_interval_s:
            prefetch = self._free_slot(costs, wait, best, demand)
        if costs.absent[best] or prefetch:
            self._expect_loads(adapter, costs, (best, *prefetch), now_s)
        return Choice(order, hit, spill, tuple(fleet.members[i].id for i in prefetch if i != best) if prefetch else ())

    def _total_cost(self, costs: AdapterCosts, wait: Vector, rank: int, work: float, text: TextCost | None) -> Vector:
        cost: Vector = wait * costs.wait_factor
        cost += costs.cost
        if costs.homes > 1 and self._fleet.gateways > 1:  # else all routers would use the same home
            cost += self._ties(len(wait))
        age_s, other = self._fleet.report_age_s, costs.other
        if text is not None:
            cost += text.cost
            other = self._other(other, text, costs)
            if costs.homes > 1 and other is not costs.other:
                cost += self._policy.other_router_cost_s * (other - costs.other)
        if age_s > _FRESH_S:
            cost += other * np.minimum(self._random() * self._policy.report_age_factor * age_s, wait)
        if rank > 0:
            cost += self._padding(rank, work)
        return cost

    def _other(self, other: Vector, text: TextCost | None, costs: AdapterCosts | None = None) -> Vector:
        """Return 1 at replicas that this router should leave to others, 0 where a text belongs; `other` without a text.

        If news is late, that is where a text's first unknown page hashes to: then all routers send the turns of a
        conversation to the same replica before they have heard of each other's.
        """
        if text is not None and text.longest:  # other texts have no reason to go there
            other = other.copy()
            for i in text.longest:
                other[i] = 0.0
        elif text is not None and text.next_page is not None and self._fleet.news_age_s > NEWS_INTERVAL_S:
            homes = None if costs is None else costs.place < costs.homes
            other = np.ones(len(other))
            other[rendezvous.first(text.next_page, self._fleet.salts, homes)] = 0.0
        return other

    def _expect_loads(self, adapter: str, costs: AdapterCosts, replicas: Iterable[int], now_s: float) -> None:
        costs.prefetched_s = now_s
        for i in replicas:
            self._fleet.placement.expect_load(adapter, i, now_s)
        self._costs.compute(adapter, costs)

    def _ties(self, count: int) -> Vector:
        """Return random costs that break ties, as a random slice of numbers that were drawn before to save time."""
        if len(self._tie_costs) < _TIE_COSTS + count:
            self._tie_costs = self._tie_random.random(_TIE_COSTS + count) * self._policy.tie_window_s
        first = int(self._random() * _TIE_COSTS)
        return self._tie_costs[first : first + count]

    def _free_slot(self, costs: AdapterCosts, wait: Vector, best: int, demand: Demand) -> list[int]:
        """Return the replica to which a prefetch saves waiting and evicts no adapter in use, if there is one."""
        if demand.homes == 1 and not demand.is_frequent:
            return []
        free = np.where(costs.absent & ~self._fleet.full, wait + ORDER_STEP_S * costs.place, np.inf)
        i = int(free.argmin())
        return [i] if free[i] + self._policy.prefetch_wait_s < wait[best] else []

    def _padding(self, rank: int, work: float) -> Vector:
        beyond = self._fleet.pool_ranks - rank
        known = self._fleet.pool_ranks > 0
        cost_s = beyond * (work * self._policy.rank_padding_cost_s)
        cost: Vector = np.where(beyond < 0, _OVERSIZE_COST_S, cost_s) * known
        return cost

    def _refresh(self, now_s: float) -> None:
        self._fleet.refresh(now_s)
        if not 0 <= now_s - self._demand_checked_s <= _DEMAND_INTERVAL_S:
            self._demand_checked_s = now_s
            self._costs.set_tight(self._home_size.update(self._policy, now_s))
            self._costs.drop(self._fleet.placement.expire(now_s))
        self._costs.refresh(now_s)


def _spill(costs: AdapterCosts, avoided: int) -> str:
    return "retry" if avoided >= 0 and costs.place[avoided] < costs.homes else "load"


def _best(cost: Vector, avoided: int) -> tuple[int, ...]:
    if avoided >= 0:
        cost[avoided] = np.inf
    if len(cost) <= _MAX_SORTED:
        return tuple(cost.argsort()[:SHORTLIST].tolist())
    few = cost.argpartition(SHORTLIST - 1)[:SHORTLIST]
    return tuple(few[cost[few].argsort(kind="stable")].tolist())
