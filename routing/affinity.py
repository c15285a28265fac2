"""Which replica should answer a request: the one that costs least. Pure: no Ray, no clock of its own.

The cost of a replica, in seconds: the wait that is expected there, what it takes to bring the adapter (nothing where it
is in a slot; more where another must leave for it), and the work that padding its rank to the pool's adds. An adapter
has as many homes as its traffic is worth, the first of its rendezvous order, and leaves them only where that pays.
"""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, fields, replace
from queue import SimpleQueue
from random import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.routing import rendezvous
from ranklet.routing.demand import Demand
from ranklet.routing.fleet import Fleet, Vector
from ranklet.routing.report import StateReport

SHORTLIST = 8  # replicas in a choice, for a router that finds the best one full or dead
_ROWS_BYTES = 128 << 20  # kept of adapters' costs
_DEMANDS = 65_536  # adapters whose traffic is remembered
_BEYOND_S = 1e5  # for a rank that the replica's pool cannot hold
_TIGHT = 0.9  # of all slots are needed for one home each: a copy takes another adapter's only place
_FILLED = 0.5  # of all slots may be homes
_GLANCE_S = 0.05  # between two looks at what changes all costs
_LOOK_S = 1.0  # between two looks at the demand for all adapters
_NOTICED_S = 0.001  # news that is younger says how things are
_SORTED = 128  # so few replicas are sorted sooner than searched
_DRAWN = 4096  # random numbers that are used again
_NEAR_S = 1e-6  # a place further down the rendezvous order


@dataclass(frozen=True)
class Policy:
    """What a router weighs; seconds unless said otherwise.

    Raises:
        ValueError: a field is out of range.
    """

    load_of_home: float = 0.02  # how much of a replica's rate one adapter may take before it gets another home,
    load_of_crowded_home: float = 0.5  # and where the slots have no room for so many homes
    tie_s: float = 0.005  # waits that differ by less are as good as equal
    scatter_s: float = 0.1  # what one more place for an adapter costs the others, beside its load
    reluctance: float = 1.0  # a wait at home must be so much longer, as a part, before one more place is tried
    tight_loads: float = 4  # and the loads that it leads to, where the adapters need nearly all slots there are
    displace_s: float = 0.3  # where every slot holds what no other replica has, so that some adapter must leave
    relief_s: float = 0.05  # a wait for which a copy is brought to a free slot elsewhere
    prefetch_s: float = 0.5  # between two such orders for one adapter
    share_s: float = 0.02  # what a home that another router looks after must spare of the wait, to be preferred
    damping: float = 2.0  # a wait must be longer by so many times the age of the news before all requests go elsewhere
    padding_s: float = 2.4e-9  # per token and rank of padding: what `ranklet profile` says of an H200

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{each.name}: expected a number from 0 on, got {value!r}")
        for name in ("load_of_home", "load_of_crowded_home"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected more than 0, got 0")


class Choice(NamedTuple):
    """Where to send a request.

    Attributes:
        order: indices of replicas, the best first, at most SHORTLIST.
        hit: the best one had said that it holds the adapter; None without an adapter.
        spill: why the best one is none of the adapter's homes: "load" (they are too busy) or "retry" (the home has just
            failed the request). None if it is one.
        prefetch: ids of replicas that should load the adapter now, ahead of requests.
    """

    order: tuple[int, ...]
    hit: bool | None = None
    spill: str | None = None
    prefetch: tuple[str, ...] = ()


@dataclass(slots=True)
class _Row:
    """An adapter's costs at every replica, of one membership. Arrays: [replicas]."""

    order: NDArray[np.int32]  # place in its rendezvous order, from 0
    homes: int
    place: NDArray[np.int32] = field(init=False)  # the same, holders first
    cost: Vector = field(init=False)
    factor: Vector = field(init=False)  # what its wait counts for: more where it is reluctant to go
    other: Vector = field(init=False)  # 1 where it is no home, or one that another router looks after
    absent: NDArray[np.bool_] = field(init=False)
    made: int = -1  # `Affinity._changes` when the costs were made
    ordered_s: float = -math.inf  # when it was last sent somewhere new


class Affinity:
    """The choices of one router. Thread-safe: reports come on other threads than requests."""

    def __init__(self, policy: Policy = Policy(), fleet: Fleet | None = None) -> None:
        self.policy = policy
        self.fleet = fleet or Fleet()
        self.lock = threading.RLock()
        self._rows: OrderedDict[str, _Row] = OrderedDict()
        self._demands: OrderedDict[str, Demand] = OrderedDict()
        self._generation = -1
        self._looked_s, self._home_rate, self._tight = -math.inf, 1.0, 0.0
        self._changes = 0  # of what all rows depend on
        self._glanced_s, self._crowds, self._divisions = -math.inf, np.zeros(0, bool), -1
        self._random = np.random.default_rng()
        self._drawn: Vector = np.zeros(0)
        self._drawn_most_s = 0.0
        self.orders: SimpleQueue[tuple[str, str]] | None = None  # (replica, adapter) of each `Choice.prefetch`

    def choose(
        self, adapter: str | None, tokens: int, now_s: float, *, rank: int = 0, avoid: str | None = None
    ) -> Choice:
        """Where a request of so many tokens should go; an empty order without replicas.

        Args:
            adapter: None for the base model.
            rank: of the adapter, 0 if unknown.
            avoid: id of the replica that has just failed this request; it comes last.
        """
        with self.lock:
            fleet = self.fleet
            if not len(fleet):
                return Choice(())
            wait = fleet.waits(now_s)
            shunned = fleet.index.get(avoid, -1) if avoid else -1
            if not adapter:
                cost = wait + self._ties(len(wait))
                cost += self.policy.share_s * ~fleet.own
                return Choice(_best(cost, shunned))
            policy, demand = self.policy, self._demand(adapter)
            demand.count(max(tokens, 1), now_s)
            if not 0 <= now_s - self._glanced_s <= _GLANCE_S or self._generation != fleet.generation:
                self._glance(now_s)
            worth = demand.tokens_per_s(now_s) / self._home_rate
            before, homes = demand.homes, demand.settle(worth, len(fleet), now_s, hasty=self._tight > 0)
            row = self._row(adapter, homes)
            cost = wait * row.factor + row.cost
            if homes > 1 and fleet.gateways > 1:  # all would take the same one
                cost += self._ties(len(wait))
            if fleet.lag_s > _NOTICED_S:
                cost += row.other * np.minimum(random() * policy.damping * fleet.lag_s, wait)
            if rank > 0:
                cost += self._padding(rank, tokens)
            order = _best(cost, shunned)
            best = order[0]
            prefetch: list[int] = []
            if homes > before:
                prefetch = np.flatnonzero((row.place < homes) & row.absent).tolist()
            elif wait[best] > self.policy.relief_s and now_s - row.ordered_s > self.policy.prefetch_s:
                prefetch = self._relief(row, wait, best, demand)
            hit = fleet.tenancy.places(adapter).get(best, False)
            spill = None if row.place[best] < row.homes else self._spill(row, shunned)
            if row.absent[best] or prefetch:
                row.ordered_s = now_s
                for i in (best, *prefetch):
                    fleet.tenancy.claim(adapter, i, now_s)
                self._price(adapter, row)
            ordered = tuple(fleet.members[i].id for i in prefetch if i != best) if prefetch else ()
            return Choice(order, hit, spill, ordered)

    def _ties(self, count: int) -> Vector:
        """Costs at random, so that equals take turns: some of those that were drawn before, which is soon done."""
        most_s = self.policy.tie_s
        if self._drawn_most_s != most_s or len(self._drawn) < _DRAWN + count:
            self._drawn, self._drawn_most_s = self._random.random(_DRAWN + count) * most_s, most_s
        first = int(random() * _DRAWN)
        return self._drawn[first : first + count]

    def _relief(self, row: _Row, wait: Vector, best: int, demand: Demand) -> list[int]:
        """Where a copy costs nobody anything and would have spared some of the wait."""
        if demand.homes == 1 and not demand.is_frequent:
            return []
        idle = np.where(row.absent & ~self.fleet.full, wait + _NEAR_S * row.place, np.inf)
        i = int(idle.argmin())
        return [i] if idle[i] + self.policy.relief_s < wait[best] else []

    @staticmethod
    def _spill(row: _Row, shunned: int) -> str:
        """Why a request leaves the adapter's homes."""
        return "retry" if shunned >= 0 and row.place[shunned] < row.homes else "load"

    def _padding(self, rank: int, tokens: int) -> Vector:
        beyond = self.fleet.pool_ranks - rank
        known = self.fleet.pool_ranks > 0
        cost: Vector = np.where(beyond < 0, _BEYOND_S, beyond * (tokens * self.policy.padding_s)) * known
        return cost

    def _glance(self, now_s: float) -> None:
        """Notice what changes all costs: who is crowded, who looks after whom."""
        self._glanced_s = now_s
        if not 0 <= now_s - self._looked_s <= _LOOK_S:
            self._look_at_demand(now_s)
            for name in self.fleet.tenancy.expire(now_s):
                self._rows.pop(name, None)
        self._drop_old_rows()
        crowds = self.fleet.crowded()
        if self._divisions != self.fleet.divisions or not np.array_equal(crowds, self._crowds):
            self._divisions, self._crowds = self.fleet.divisions, crowds
            self._changes += 1

    def _look_at_demand(self, now_s: float) -> None:
        """How much of an adapter's traffic one home takes: as little as the slots of all replicas have room for."""
        self._looked_s = now_s
        policy, fleet = self.policy, self.fleet
        rate = fleet.rate() / fleet.gateways  # of a replica, of the traffic that this router sees
        active = [each for each in self._demands.values() if each.is_active(now_s)]
        wanted = np.array([each.tokens_per_s(now_s) for each in active]) / rate
        unseen = max(len(fleet.tenancy) - len(active), 0)  # adapters that other routers know of
        slots = float(fleet.slots.sum()) or math.inf
        load = policy.load_of_home
        while _homes(wanted, load) + unseen > _FILLED * slots and load < policy.load_of_crowded_home:
            load = min(load * 1.25, policy.load_of_crowded_home)
        needed = (_homes(wanted, policy.load_of_crowded_home) + unseen) / slots
        tight = round(min(max((needed - _FILLED) / (_TIGHT - _FILLED), 0.0), 1.0), 1)
        self._changes += tight != self._tight
        self._tight = tight
        self._home_rate = load * rate

    def _demand(self, adapter: str) -> Demand:
        found = self._demands.get(adapter)
        if found is None:
            found = self._demands[adapter] = Demand()
            if len(self._demands) > _DEMANDS:
                self._demands.popitem(last=False)
        else:
            self._demands.move_to_end(adapter)
        return found

    def _row(self, adapter: str, homes: int) -> _Row:
        """The adapter's costs, made when first asked for and after each change of the replicas."""
        fleet = self.fleet
        self._drop_old_rows()
        row = self._rows.get(adapter)
        if row is not None and row.homes == homes and row.made == self._changes:
            self._rows.move_to_end(adapter)
            return row
        count = len(fleet)
        if row is None:
            row = _Row(_places(rendezvous.order(adapter, fleet.salts)), homes)
            if len(self._rows) >= _ROWS_BYTES // (count * 33 + 512):
                self._rows.popitem(last=False)
            self._rows[adapter] = row
        row.homes = homes
        self._price(adapter, row)
        return row

    def _drop_old_rows(self) -> None:
        if self._generation != self.fleet.generation:
            self._rows.clear()
            self._generation, self._glanced_s = self.fleet.generation, -math.inf

    def _price(self, adapter: str, row: _Row) -> None:
        """What each replica costs beside its wait.

        Those that hold the adapter are its first homes, then those with room for it, each in rendezvous order. A copy
        beyond its homes is used where it spares a wait and left alone otherwise, so that it grows old and makes room.
        """
        fleet, policy = self.fleet, self.policy
        places = fleet.tenancy.places(adapter)
        row.absent = np.ones(len(fleet), bool)
        row.absent[list(places)] = False
        crowded = row.absent & self._crowds
        coming = np.zeros(len(fleet), bool)
        coming[[i for i, ready in places.items() if not ready]] = True
        row.place = _ranked(row.order + len(fleet) * (coming + np.int32(2) * row.absent + crowded))
        away = row.place >= row.homes
        bring = fleet.from_disk_s.copy()
        hosts = list(fleet.tenancy.hosts.get(adapter, ()))
        bring[hosts] = fleet.from_host_s[hosts]
        others = fleet.others_of(row.place, row.homes) if row.homes > 1 else False
        scatter_s = policy.scatter_s + policy.tight_loads * self._tight * bring
        stray = policy.tie_s + policy.tight_loads * self._tight * bring
        there = stray * away + bring / 2 * coming  # some of what it takes is done
        cost = np.where(row.absent, bring + policy.displace_s * crowded + scatter_s * away, there)
        row.cost = cost + _NEAR_S * row.place + policy.share_s * others
        row.other = (away | others).astype(np.float64)
        row.factor = 1.0 + policy.reluctance * (row.absent & away).astype(np.float64)
        row.made = self._changes

    def told(self, report: StateReport, sender: str, now_s: float, age_s: float = 0.0) -> None:
        """A replica says how it is, unasked; `sender` is what this process calls itself when it sends."""
        with self.lock:
            fleet, received = self.fleet, report.received_tokens.get(sender, 0)
            if sender in report.gateways:
                fleet.share(len(report.gateways), report.gateways.index(sender))
            fleet.hear(report.replica, replace(report.load, received_tokens=received), now_s, age_s)
            fleet.alive(report.replica, now_s)
            self._drop_old_rows()
            for name in fleet.hold(report.replica, report.holdings) & self._rows.keys():
                self._price(name, self._rows[name])


def _homes(wanted: Vector, load: float) -> float:
    """Homes that adapters with these rates, in replicas, are worth where one takes so much of them."""
    return float(np.maximum(np.ceil(wanted / load), 1).sum())


def _places(order: NDArray[np.intp]) -> NDArray[np.int32]:
    """The place of each index in an order."""
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order))
    return places


def _ranked(keys: NDArray[np.int32]) -> NDArray[np.int32]:
    """The place of each key among them all, from 0; they are distinct."""
    return _places(keys.argsort())


def _best(cost: Vector, shunned: int) -> tuple[int, ...]:
    if shunned >= 0:
        cost[shunned] = np.inf
    if len(cost) <= _SORTED:
        return tuple(cost.argsort()[:SHORTLIST].tolist())
    few = cost.argpartition(SHORTLIST - 1)[:SHORTLIST]
    return tuple(few[cost[few].argsort(kind="stable")].tolist())


_CURRENT = Affinity()


def current() -> Affinity:
    """This process's. A function, since Ray may ship the router's class by value, with copies of what it names."""
    return _CURRENT
