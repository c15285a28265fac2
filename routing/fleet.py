"""The replicas as one router sees them: their reports, and the work that it has sent. Callers pass the time.

Times are seconds of any clock. If the clock jumps back, reports look recent. Reports are checked before use, so that a
faulty replica cannot break the router.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.routing import rendezvous
from ranklet.routing.in_flight import InFlight, Sent
from ranklet.routing.placement import Placement
from ranklet.routing.policy import REPLICA_SILENCE_LIMIT_S
from ranklet.routing.report import REPORT_INTERVAL_S, Holdings, QueueLoad, limited_age_s
from ranklet.routing.text_loads import TextLoads
from ranklet.routing.view import ReplicaView

_DEFAULT_WORK_PER_S = 100_000.0
_DEFAULT_FROM_DISK_S = 0.15
_DEFAULT_FROM_HOST_S = 0.02
_HUNG_COST_S = 1e6
_STALE_S = 1.0  # a report this old shows nothing of the work that other routers have sent since
_AGE_WEIGHT = 0.05  # of one report, in the mean age of reports
_HUNG_CHECK_INTERVAL_S = 0.25

Vector = NDArray[np.float64]

# Arrays with one value per replica, kept for replicas that stay when the membership changes.
_PER_REPLICA = (
    "_queued", "_sent", "_received", "_owed", "_done", "_reported_s", "_heard_s", "_clear_s", "_least_s", "rates",
    "_measured", "_told", "full", "slots", "pool_ranks", "from_disk_s", "from_host_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A replica's identity. A replacement of a dead replica has its rank, and thereby becomes home of its adapters."""

    id: str
    rank: int


class Fleet:
    """The replicas by index, in the order given to `set_members`.

    Attributes:
        generation: number of membership changes. Indices are valid within one generation.
        gateways, gateway_index: number of routers that use the same replicas, and the index of this one.
        own: bool [replicas], replicas that this router prefers among equals.
        own_version: number of changes of `own`.
        report_age_s: mean age of reports on arrival.
        news_age_s: the same, and no less than the time since the latest report of all.
        rates: float64 [replicas], work per second.
        mean_rate: of all replicas.
        full: bool [replicas], every slot is loading or was used recently.
        slots, pool_ranks, from_disk_s, from_host_s: float64 [replicas], see `Holdings`.
        texts: what replicas have told of theirs.
        placement: where adapters have slots.
    """

    def __init__(self) -> None:
        self.members: tuple[Member, ...] = ()
        self.index: dict[str, int] = {}
        self.salts = rendezvous.salted(())
        self.generation = 0
        self.gateways, self.gateway_index = 1, 0
        self.own: NDArray[np.bool_] = np.ones(0, bool)
        self.own_version = 0
        self.report_age_s = self.news_age_s = 0.0
        self.mean_rate = _DEFAULT_WORK_PER_S
        self.placement, self.texts = Placement(0), TextLoads(0)
        self._checked_s = self._now_s = -math.inf
        self._hung: NDArray[np.bool_] | None = None  # None: no replica
        self._in_flight = InFlight()
        self._load_numbers: dict[str, int] = {}  # of the last load, by replica
        self._holdings: dict[str, Holdings] = {}
        self._allocate(0)

    def __len__(self) -> int:
        return len(self.members)

    def _allocate(self, count: int) -> None:
        self._queued, self._sent, self._received, self._owed, self._done, self._told = np.zeros((6, count))
        self._reported_s, self._heard_s = np.zeros((2, count))
        self._clear_s, self._least_s = np.zeros((2, count))  # time at which all work is done; shortest possible wait
        self.rates, self._measured = np.full(count, _DEFAULT_WORK_PER_S), np.zeros(count, bool)
        self.full, self.slots, self.pool_ranks = np.zeros(count, bool), np.zeros(count), np.zeros(count)
        self.from_disk_s, self.from_host_s = np.full(count, _DEFAULT_FROM_DISK_S), np.full(count, _DEFAULT_FROM_HOST_S)

    # Membership

    def set_members(self, members: Iterable[Member], now_s: float) -> None:
        """Replace the membership. Replicas that stay keep their state."""
        members = tuple(members)
        if members == self.members:
            return
        old_index, old_arrays = self.index, [getattr(self, name) for name in _PER_REPLICA]
        self.members = members
        self.index = {member.id: i for i, member in enumerate(members)}
        self.salts = rendezvous.salted([member.rank for member in members])
        self.generation += 1
        self._allocate(len(members))
        texts, self.texts = self.texts, TextLoads(len(members))
        self._reported_s[:], self._heard_s[:] = now_s, now_s
        stay = [(i, old_index[member.id]) for i, member in enumerate(members) if member.id in old_index]
        if stay:
            new, old = np.array(stay).T
            for name, array in zip(_PER_REPLICA, old_arrays, strict=True):
                getattr(self, name)[new] = array[old]
            self.texts.keep(texts, new, old)
        self._assign_own()
        self._hung, self._checked_s = None, -math.inf
        self._guess_rates()
        self._load_numbers = {id: number for id, number in self._load_numbers.items() if id in self.index}
        self._holdings = {id: held for id, held in self._holdings.items() if id in self.index}
        self._in_flight.retain(self.index)
        self.placement = Placement(len(members))
        for id, held in self._holdings.items():
            self.placement.update(self.index[id], None, held)

    def set_gateways(self, gateways: int, gateway_index: int) -> None:
        """Set the number of routers that use the same replicas, and the index of this one.

        Each router prefers its own part of the replicas among equals. Most work of a replica then comes from one
        router, which counts it at once; other routers see it only in the next report.
        """
        if (gateways, gateway_index) != (self.gateways, self.gateway_index):
            self.gateways, self.gateway_index = gateways, gateway_index
            self._assign_own()

    def _assign_own(self) -> None:
        parts = max(min(self.gateways, len(self)), 1)
        self.own = np.arange(len(self)) % parts == self.gateway_index % parts
        self.own_version += 1

    def preferred_by_others(self, place: NDArray[np.int32], homes: int) -> NDArray[np.bool_]:
        """Return which replicas are not among the homes of an adapter that this router prefers: bool [replicas].

        Args:
            place: int32 [replicas], the place of each replica in the adapter's order.
            homes: number of homes, the first of that order.
        """
        own_homes = (place < homes) & self.own
        if not own_homes.any():
            own_homes = place == self.gateway_index % homes
        return ~own_homes

    def _guess_rates(self) -> None:
        if self._measured.any():
            self.rates[~self._measured] = np.median(self.rates[self._measured])

    # Reports of replicas

    def update_load(self, replica: str, load: QueueLoad, now_s: float, age_s: float = 0.0) -> bool:
        """Store a load. Returns False if it is impossible, or older than the stored one.

        Args:
            age_s: age of the load by wall clocks.
        """
        age_s = limited_age_s(age_s)
        i = self.index.get(replica)
        if i is None or not load.is_possible() or load.number < self._load_numbers.get(replica, -1):
            return False
        self._load_numbers[replica] = load.number
        self.report_age_s += (age_s - self.report_age_s) * _AGE_WEIGHT
        if load.done_work != self._done[i] or not load.queued_work:
            self._heard_s[i] = now_s
        self._done[i], self._queued[i], self._reported_s[i] = load.done_work, load.queued_work, now_s - age_s
        if load.work_per_s > 0:
            self.rates[i] = load.work_per_s
            if not self._measured[i]:
                self._measured[i] = True
                self._guess_rates()
        self._received[i] = load.received_work
        self.texts.update(i, load, float(self.rates[i]), age_s)
        if self._owed[i] == 0:  # everything sent has arrived: start again from the replica's own number
            self._sent[i] = load.received_work
        self._update_wait(i)
        return True

    def refresh(self, now_s: float) -> None:
        """Update what changes with time alone. Callers do this a few times a second."""
        ages_s = now_s - self._reported_s
        # A replica without news sends none for a second: until then, the last report still holds.
        self.texts.refresh(self.report_age_s + np.maximum(ages_s - self.report_age_s - REPORT_INTERVAL_S, 0.0))
        self.news_age_s = self.report_age_s
        if len(self):
            self.news_age_s = max(self.report_age_s, float(ages_s.min()))
            self.mean_rate = float(self.rates.mean())

    def mark_alive(self, replica: str, now_s: float) -> None:
        i = self.index.get(replica)
        if i is not None:
            self._heard_s[i] = now_s
            if self._hung is not None:
                self._checked_s = -math.inf

    def update_holdings(self, replica: str, held: Holdings) -> frozenset[str]:
        """Store the adapters that a replica holds. Returns those for which something changed."""
        i = self.index.get(replica)
        before = self._holdings.get(replica)
        if i is None or not held.is_possible() or (before is not None and held.number < before.number):
            return frozenset()
        self.full[i] = held.used_slots >= held.slots
        self.slots[i], self.pool_ranks[i] = held.slots, held.pool_rank
        self.from_disk_s[i] = held.from_disk_s or _DEFAULT_FROM_DISK_S
        self.from_host_s[i] = held.from_host_s or _DEFAULT_FROM_HOST_S
        self._holdings[replica] = held
        return self.placement.update(i, before, held)

    def crowded_replicas(self) -> NDArray[np.bool_]:
        """Return which replicas hold only adapters that no other replica has, in every slot: bool [replicas]."""
        crowded: NDArray[np.bool_] = (self.slots > 0) & (self.placement.owned > self.slots - 0.5)
        return crowded

    # Requests of this router

    def add_request(self, request: int, i: int, work: float, now_s: float, told: float | None = None) -> bool:
        """Count a request at replica `i`, and no longer at another one. Returns False if it has ended already.

        Args:
            told: see `Sent`; None for `work`.
        """
        if request in self._in_flight:
            self.complete_request(request, arrived=False)
        sent = Sent(self.members[i].id, work, work if told is None else told)
        if not self._in_flight.add(request, sent):
            return False
        if self._owed[i] <= 0:
            self._heard_s[i] = max(self._heard_s[i], now_s)
        self._sent[i] += sent.told
        self._owed[i] += work
        self._told[i] += sent.told
        self._update_wait(i)
        return True

    def begin_request(self, request: int) -> None:
        """Note the first token of a text: its prompt delays no others any more."""
        sent = self._in_flight.get(request)
        i = None if sent is None else self.index.get(sent.replica)
        if sent is not None and i is not None:
            # A rest of work stays, so that a hung replica is noticed.
            left = sent._replace(work=min(sent.work, 1.0), told=min(sent.told, 1.0))
            self._in_flight.add(request, left)
            self._settle(i, sent.work - left.work, sent.told - left.told)

    def complete_request(self, request: int, *, arrived: bool = True) -> None:
        """Remove a request that was answered or has failed.

        Args:
            arrived: False if the request may not have reached its replica.
        """
        sent = self._in_flight.remove(request)
        if sent is None:
            return
        i = self.index.get(sent.replica)
        if i is not None:
            self._sent[i] -= 0 if arrived else sent.told
            self._settle(i, sent.work, sent.told)

    def _settle(self, i: int, work: float, told: float) -> None:
        self._told[i] = max(self._told[i] - told, 0)
        self._owed[i] = max(self._owed[i] - work, 0) if self._told[i] else 0.0  # fractions leave no rest
        self._update_wait(i)

    def replica_of(self, request: int) -> str | None:
        return self._in_flight.replica_of(request)

    # Expected waits

    def _update_wait(self, i: int) -> None:
        told = self._told[i]
        unseen = min(max(self._sent[i] - self._received[i], 0.0), told) * (self._owed[i] / told if told else 0.0)
        age_s = max(self._now_s - self._reported_s[i], 0.0)
        routers = 1.0 if self.own[i] else 1.0 + (self.gateways - 1) * min(age_s / _STALE_S, 1.0)
        self._clear_s[i] = self._reported_s[i] + (self._queued[i] + routers * unseen) / self.rates[i]
        self._least_s[i] = self._owed[i] / self.rates[i]

    def waits(self, now_s: float) -> Vector:
        """Return the seconds until each replica would start new work: float64 [replicas]. Hung replicas come last.

        The wait is the reported queue, drained since at the replica's own rate, plus the work that this router has
        sent and the replica had not received then. At replicas that other routers prefer, other routers are assumed to
        send as much; the older the last report, the more of it counts. The wait is never less than this router's own
        unanswered work.
        """
        now_s = self._now_s = max(now_s, self._now_s)
        waits: Vector = np.maximum(self._clear_s - now_s, self._least_s)
        if now_s - self._checked_s > _HUNG_CHECK_INTERVAL_S:
            self._checked_s = now_s
            hung = self._is_hung(now_s)
            self._hung = hung if hung.any() else None
        return waits if self._hung is None else waits + _HUNG_COST_S * self._hung

    def views(self, now_s: float) -> list[ReplicaView]:
        waits = self.waits(now_s)
        return [
            ReplicaView(
                each.id, each.rank, float(waits[i]), float(self._queued[i]), float(self.rates[i]),
                max(now_s - float(self._heard_s[i]), 0.0), self._holdings.get(each.id),
            )
            for i, each in enumerate(self.members)
        ]  # fmt: skip

    def hung_replicas(self, now_s: float) -> Sequence[str]:
        return [self.members[i].id for i in np.flatnonzero(self._is_hung(now_s))]

    def _is_hung(self, now_s: float) -> NDArray[np.bool_]:
        hung: NDArray[np.bool_] = (self._owed > 0) & (now_s - self._heard_s > REPLICA_SILENCE_LIMIT_S)
        return hung
