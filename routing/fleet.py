"""What one router knows of the replicas: told by them, and what it has sent itself. Pure: the caller brings the time.

Times are seconds of any clock; one that jumps back makes things look fresh, never wrong. What a replica says is checked
before it is believed, since one that talks nonsense must not take the router with it.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranklet.routing import rendezvous
from ranklet.routing.placement import Placement
from ranklet.routing.report import Holdings, QueueLoad

MOST_TOKENS = 1 << 50  # a claim above is nonsense
LEAST_TOKENS_PER_S = 1e-3
MOST_AGE_S = 10.0
MOST_LOAD_S = 3600.0
GUESSED_TOKENS_PER_S = 100_000.0
GUESSED_FROM_DISK_S = 0.15
GUESSED_FROM_HOST_S = 0.02
SILENCE_S = 4.0  # owing answers and saying nothing for so long, a replica is taken for hung
_NEVER_S = 1e6
_STALE_S = 1.0  # what is heard so late says nothing of what others have sent since
_MOST_OVER = 4096
_LAG_WEIGHT = 0.05
_LOOK_S = 0.25  # between two looks for hung replicas

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Member:
    """A replica's identity. `rank` is its place: one that takes a dead one's place gets its rank, and its adapters."""

    id: str
    rank: int


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a router has heard of one replica."""

    id: str
    rank: int
    wait_s: float
    queued_tokens: int
    tokens_per_s: float
    silent_s: float  # since it was last heard of
    holdings: Holdings | None


class Fleet:
    """The replicas by index, in the order given to `join`. Arrays: float64 [replicas]."""

    def __init__(self) -> None:
        self.members: tuple[Member, ...] = ()
        self.index: dict[str, int] = {}
        self.salts = rendezvous.salted(())
        self.generation = 0  # of the membership: indices of another one mean other replicas
        self.gateways, self.turn = 1, 0  # routers that send to the same replicas, and which of them this one is
        self.own: NDArray[np.bool_] = np.ones(0, bool)  # replicas that this router looks after
        self.divisions = 0  # changes of `own`
        self.nonsense = 0  # reports that were not believed
        self.lag_s = 0.0  # how old what is heard is by then, on the average
        self._looked_s = self._now_s = -math.inf
        self._hung: NDArray[np.bool_] | None = None  # None: no replica
        self._open: dict[int, tuple[str, int]] = {}  # requests: replica, tokens
        self._over: OrderedDict[int, None] = OrderedDict()  # requests that ended before they were sent
        self._loads: dict[str, int] = {}  # number of the last load, by replica
        self._holdings: dict[str, Holdings] = {}
        self.tenancy = Placement(0)
        self._make(0)

    def __len__(self) -> int:
        return len(self.members)

    def _make(self, count: int) -> None:
        self._queued, self._sent, self._received, self._owed = np.zeros((4, count))
        self._reported_s, self._heard_s, self._done = np.zeros((3, count))
        self._clear_s, self._least_s = np.zeros((2, count))  # `waits`: when all is done, and how long it takes at least
        self._rate, self._measured = np.full(count, GUESSED_TOKENS_PER_S), np.zeros(count, bool)
        self.full, self.slots, self.pool_ranks = np.zeros(count, bool), np.zeros(count), np.zeros(count)
        self.from_disk_s, self.from_host_s = np.full(count, GUESSED_FROM_DISK_S), np.full(count, GUESSED_FROM_HOST_S)

    def join(self, members: Iterable[Member], now_s: float) -> None:
        """Replace the membership; what is known of those that stay is kept."""
        members = tuple(members)
        if members == self.members:
            return
        old, before = dict(self.index), self.__dict__.copy()
        self.members = members
        self.index = {member.id: i for i, member in enumerate(members)}
        self.salts = rendezvous.salted([member.rank for member in members])
        self.generation += 1
        self._make(len(members))
        self._reported_s[:], self._heard_s[:] = now_s, now_s
        stay = [(i, old[member.id]) for i, member in enumerate(members) if member.id in old]
        if stay:
            new, was = np.array(stay).T
            for name, array in before.items():
                if isinstance(array, np.ndarray) and name not in ("salts", "_hung", "own"):
                    getattr(self, name)[new] = array[was]
        self._divide()
        self._hung, self._looked_s = None, -math.inf
        self._guess_rates()
        self._loads = {id: number for id, number in self._loads.items() if id in self.index}
        self._holdings = {id: held for id, held in self._holdings.items() if id in self.index}
        self._open = {key: hint for key, hint in self._open.items() if hint[0] in self.index}
        self.tenancy = Placement(len(members))
        for id, held in self._holdings.items():
            self.tenancy.told(self.index[id], None, held)

    def share(self, gateways: int, turn: int) -> None:
        """There are so many routers, and this is the `turn`th of them.

        Each looks after its part of the replicas and prefers them among equals. What is sent to a replica then mostly
        comes from one router, which knows of it at once, where all would hear of each other's requests too late.
        """
        if (gateways, turn) != (self.gateways, self.turn):
            self.gateways, self.turn = gateways, turn
            self._divide()

    def _divide(self) -> None:
        parts = max(min(self.gateways, len(self)), 1)
        self.own = np.arange(len(self)) % parts == self.turn % parts
        self.divisions += 1

    def others_of(self, place: NDArray[np.int32], homes: int) -> NDArray[np.bool_]:
        """Which replicas, of an adapter with several homes, other routers look after."""
        at_home = place < homes
        own = at_home & self.own
        if not own.any():
            own = place == self.turn % homes
        return ~own

    def _guess_rates(self) -> None:
        """A replica that has not measured itself is taken for as fast as the others."""
        if self._measured.any():
            self._rate[~self._measured] = np.median(self._rate[self._measured])

    # What replicas tell

    def hear(self, replica: str, load: QueueLoad, now_s: float, age_s: float = 0.0) -> bool:
        """Believe a load, if it is sane and not older than what is known; whether it was.

        Args:
            age_s: of the load, as far as clocks tell; what is out of range is taken for the nearest that is not.
        """
        age_s = min(max(age_s, 0.0), MOST_AGE_S) if math.isfinite(age_s) else 0.0
        i = self.index.get(replica)
        if i is None:
            return False
        if not _is_sane(load):
            self.nonsense += 1
            return False
        if load.number < self._loads.get(replica, -1):
            return False
        self._loads[replica] = load.number
        self.lag_s += (age_s - self.lag_s) * _LAG_WEIGHT
        if load.done_tokens != self._done[i] or not load.queued_tokens:
            self._heard_s[i] = now_s
        self._done[i], self._queued[i], self._reported_s[i] = load.done_tokens, load.queued_tokens, now_s - age_s
        if load.tokens_per_s > 0:
            self._rate[i] = load.tokens_per_s
            if not self._measured[i]:
                self._measured[i] = True
                self._guess_rates()
        self._received[i] = load.received_tokens
        if self._owed[i] == 0:  # all that was sent has arrived: whatever was miscounted is forgotten
            self._sent[i] = load.received_tokens
        self._foresee(i)
        return True

    def alive(self, replica: str, now_s: float) -> None:
        """A replica has answered, or has said that it is at work."""
        i = self.index.get(replica)
        if i is not None:
            self._heard_s[i] = now_s
            if self._hung is not None:
                self._looked_s = -math.inf

    def hold(self, replica: str, held: Holdings) -> frozenset[str]:
        """Believe what a replica holds; the names of the adapters for which something changed."""
        i = self.index.get(replica)
        before = self._holdings.get(replica)
        if i is None or (before is not None and held.number < before.number):
            return frozenset()
        times = (held.from_disk_s, held.from_host_s)
        if not all(0 <= s <= MOST_LOAD_S for s in times) or min(held.slots, held.taken, held.pool_rank) < 0:
            self.nonsense += 1
            return frozenset()
        full = held.taken >= held.slots
        self.full[i], self.slots[i] = full, held.slots
        self.pool_ranks[i] = held.pool_rank
        self.from_disk_s[i] = held.from_disk_s or GUESSED_FROM_DISK_S
        self.from_host_s[i] = held.from_host_s or GUESSED_FROM_HOST_S
        self._holdings[replica] = held
        return self.tenancy.told(i, before, held)

    def crowded(self) -> NDArray[np.bool_]:
        """Replicas that have room for another adapter at some adapter's cost only."""
        crowded: NDArray[np.bool_] = (self.slots > 0) & (self.tenancy.owned > self.slots - 0.5)
        return crowded

    # What this router does

    def sent(self, request: int, i: int, tokens: int, now_s: float) -> None:
        """A request goes to replica `i`; one that went elsewhere before has left there."""
        if request in self._over:  # its client left while it waited for a replica
            return
        if request in self._open:
            self.ended(request, arrived=False)
        if self._owed[i] <= 0:
            self._heard_s[i] = max(self._heard_s[i], now_s)
        self._open[request] = (self.members[i].id, tokens)
        self._sent[i] += tokens
        self._owed[i] += tokens
        self._foresee(i)

    def ended(self, request: int, *, arrived: bool = True) -> None:
        """A request was answered or has failed; it may never have `arrived` at its replica."""
        if request not in self._open:
            self._over[request] = None
            if len(self._over) > _MOST_OVER:
                self._over.popitem(last=False)
            return
        replica, tokens = self._open.pop(request)
        i = self.index.get(replica)
        if i is None:
            return
        self._owed[i] = max(self._owed[i] - tokens, 0)
        if not arrived:
            self._sent[i] -= tokens
        self._foresee(i)

    def _foresee(self, i: int) -> None:
        """What `waits` says of a replica, after something about it has changed."""
        unseen = min(max(self._sent[i] - self._received[i], 0.0), self._owed[i])
        age_s = max(self._now_s - self._reported_s[i], 0.0)
        alike = 1.0 if self.own[i] else 1.0 + (self.gateways - 1) * min(age_s / _STALE_S, 1.0)
        self._clear_s[i] = self._reported_s[i] + (self._queued[i] + alike * unseen) / self._rate[i]
        self._least_s[i] = self._owed[i] / self._rate[i]

    def where(self, request: int) -> str | None:
        """The replica that a request in flight was sent to."""
        return self._open[request][0] if request in self._open else None

    # What follows from it

    def waits(self, now_s: float) -> Vector:
        """Seconds until each replica would begin something sent to it now.

        What it said was queued, drained since at its own rate, and what this router has sent that it had not seen then.
        The less is heard of a replica that others look after, the more they are taken to send there what this one does.
        At least what this router waits for itself.
        """
        now_s = self._now_s = max(now_s, self._now_s)
        waits: Vector = np.maximum(self._clear_s - now_s, self._least_s)
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            hung = self._is_hung(now_s)
            self._hung = hung if hung.any() else None
        return waits if self._hung is None else waits + _NEVER_S * self._hung

    def seen(self, now_s: float) -> list[ReplicaView]:
        """All replicas, for people to look at."""
        waits = self.waits(now_s)
        return [
            ReplicaView(
                each.id, each.rank, float(waits[i]), int(self._queued[i]), float(self._rate[i]),
                max(now_s - float(self._heard_s[i]), 0.0), self._holdings.get(each.id),
            )
            for i, each in enumerate(self.members)
        ]  # fmt: skip

    def hung(self, now_s: float) -> Sequence[str]:
        """Replicas that owe this router answers and have been silent for too long."""
        return [self.members[i].id for i in np.flatnonzero(self._is_hung(now_s))]

    def _is_hung(self, now_s: float) -> NDArray[np.bool_]:
        hung: NDArray[np.bool_] = (self._owed > 0) & (now_s - self._heard_s > SILENCE_S)
        return hung

    def rate(self) -> float:
        """Tokens a second of a replica, on the average."""
        return float(self._rate.mean()) if len(self) else GUESSED_TOKENS_PER_S


def _is_sane(load: QueueLoad) -> bool:
    counts = (load.queued_tokens, load.done_tokens, load.received_tokens)
    rate = load.tokens_per_s
    return all(0 <= n <= MOST_TOKENS for n in counts) and (rate == 0 or LEAST_TOKENS_PER_S <= rate <= MOST_TOKENS)
