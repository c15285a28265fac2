"""The routing rules to compare: ranklet's, and common alternatives, which see every replica's queue without delay."""

import random
from collections.abc import Sequence
from typing import Protocol

from ranklet.routing import rendezvous
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import RoutingHint, TextHint
from ranklet.routing.policy import Policy
from ranklet.routing.report import QueueLoad, StateReport
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest

_MULTIPLEX_SAMPLE = 64


class Rule(Protocol):
    """A rule by which the gateways choose a replica."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        """Return the rank of the replica for a request, and of replicas that should prefetch its adapter."""
        ...

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        """Set the replicas by rank; None where there is none."""
        ...


class RankletRule:
    """ranklet's rule: one `Affinity` per gateway, each with its own view of the replicas."""

    def __init__(self, gateways: int, policy: Policy = Policy()) -> None:
        self._now_s = 0.0
        self._routers = [Affinity(policy, clock=self._clock, seed=gateway) for gateway in range(gateways)]
        for gateway, router in enumerate(self._routers):
            router.set_gateways(gateways, gateway)
        self._ranks: list[int] = []

    def _clock(self) -> float:
        return self._now_s

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        self._now_s = now_s
        self._ranks = [rank for rank, engine in enumerate(engines) if engine is not None]
        for router in self._routers:
            router.set_members([Member(f"r{rank}", rank) for rank in self._ranks])

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self._route(request, request.adapter, now_s)

    def hint(self, request: SimulatedRequest) -> TextHint | None:
        """Return what the rule lets the router know of a text."""
        return request.hint()

    def _route(self, request: SimulatedRequest, adapter: str | None, now_s: float) -> tuple[int, Sequence[int]]:
        self._now_s = now_s
        hint = RoutingHint(request.id, adapter, request.tokens, text=self.hint(request))
        choice = self._routers[request.gateway].route(hint)
        return self._ranks[choice.order[0]], [int(replica[1:]) for replica in choice.prefetch]

    def begin(self, request: SimulatedRequest, now_s: float) -> None:
        """Handle the first token of a text."""
        self._now_s = now_s
        self._routers[request.gateway].begin(request.id)

    def complete(
        self, request: SimulatedRequest, rank: int | None, load: QueueLoad | None, now_s: float,
        cached_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Handle an answer from the replica of this rank; with None, the replica is lost."""
        self._now_s = now_s
        replica = None if rank is None else f"r{rank}"
        self._routers[request.gateway].complete(request.id, replica, load, cached_tokens=cached_tokens)

    def on_report(self, report: StateReport, now_s: float, age_s: float) -> None:
        self._now_s = now_s
        for gateway, router in enumerate(self._routers):
            router.on_report(report, str(gateway), age_s)


class LeastSeen(RankletRule):
    """The shortest wait that one gateway of several expects, for any adapter: ranklet's rule for the base model."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self._route(request, None, now_s)


class GlobalRule:
    """A rule that reads every replica's queue without delay."""

    def __init__(self, seed: int = 0) -> None:
        self._engines: Sequence[SimulatedEngine | None] = ()
        self.ranks: list[int] = []
        self._random = random.Random(seed)

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        self._engines = engines
        self.ranks = [rank for rank, engine in enumerate(engines) if engine is not None]

    def engine(self, rank: int) -> SimulatedEngine:
        engine = self._engines[rank]
        assert engine is not None
        return engine

    def open_requests(self, rank: int) -> int:
        return self.engine(rank).open_requests

    def shorter_of_two(self, ranks: Sequence[int]) -> int:
        if len(ranks) == 1:
            return ranks[0]
        one, other = self._random.sample(ranks, 2)
        return one if self.open_requests(one) <= self.open_requests(other) else other


class RoundRobin(GlobalRule):
    """Each replica in turn."""

    _requests = -1

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        self._requests += 1
        return self.ranks[self._requests % len(self.ranks)], ()


class PowerOfTwo(GlobalRule):
    """The shorter queue of two random replicas: Ray Serve's default."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self.shorter_of_two(self.ranks), ()


class Multiplex(GlobalRule):
    """Ray Serve's model multiplexing: the shorter queue of two replicas that hold the adapter.

    If none holds it, or all holders have `max_requests`, the request goes to one of the replicas with the fewest
    adapters. Serve waits up to a second for a holder first; here the request goes there at once.
    """

    def __init__(self, max_requests: int = 16, seed: int = 0) -> None:
        super().__init__(seed)
        self._max_requests = max_requests  # `max_ongoing_requests`: three batches of prompts of 6,000 tokens
        self._holders: dict[str, dict[int, None]] = {}

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().set_replicas(engines, now_s)
        self._holders.clear()

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        name = request.adapter
        if name is None:
            return self.shorter_of_two(self.ranks), ()
        holders = self._holders[name] = {rank: None for rank in self._holders.get(name, ()) if self._holds(rank, name)}
        free = [rank for rank in holders if self.open_requests(rank) < self._max_requests]
        if not free:
            sample = self._random.sample(self.ranks, min(_MULTIPLEX_SAMPLE, len(self.ranks)))
            fewest = min(self._adapters(rank) for rank in sample)
            free = [rank for rank in sample if self._adapters(rank) == fewest]
        chosen = self.shorter_of_two(free)
        holders[chosen] = None
        return chosen, ()

    def _holds(self, rank: int, name: str) -> bool:
        engine = self._engines[rank]
        return engine is not None and (name in engine.resident or name in engine.loading or name in engine.waiting)

    def _adapters(self, rank: int) -> int:
        engine = self.engine(rank)
        return len(engine.resident) + len(engine.loading)


class ConsistentHash(GlobalRule):
    """Each adapter at the first replica of its rendezvous order."""

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().set_replicas(engines, now_s)
        self._salts = rendezvous.salted(self.ranks)
        self._homes: dict[str, int] = {}

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        name = request.adapter or ""
        if name not in self._homes:
            self._homes[name] = self.ranks[int(rendezvous.order(name, self._salts)[0])]
        return self._homes[name], ()


class LeastLoaded(GlobalRule):
    """The least work, known exactly and at once. No gateway of several can know them."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        # The search starts at a random replica. Else the first replicas would do all the work of a quiet cluster.
        start = self._random.randrange(len(self.ranks))
        return min((*self.ranks[start:], *self.ranks[:start]), key=lambda rank: self.engine(rank).outstanding), ()
