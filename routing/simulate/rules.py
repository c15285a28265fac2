"""The rules that are compared: ours, and what others route by. The others see every replica's queue without delay."""

import random
from collections.abc import Sequence
from typing import Protocol

from ranklet.routing import rendezvous
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import RoutingHint
from ranklet.routing.policy import Policy
from ranklet.routing.report import QueueLoad, StateReport
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest


class Rule(Protocol):
    """How the gateways choose a replica."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        """The replica for a request, and replicas that should load its adapter ahead of requests."""
        ...

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        """The replicas, by rank; None for one that is gone."""
        ...


class Ours:
    """One `Affinity` per gateway, each with its own view of the replicas."""

    def __init__(self, gateways: int, policy: Policy = Policy()) -> None:
        self._now_s = 0.0
        self._views = [Affinity(policy, clock=self._clock, seed=gateway) for gateway in range(gateways)]
        for gateway, view in enumerate(self._views):
            view.set_gateways(gateways, gateway)
        self._ranks: list[int] = []

    def _clock(self) -> float:
        return self._now_s

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        self._now_s = now_s
        self._ranks = [rank for rank, engine in enumerate(engines) if engine is not None]
        for view in self._views:
            view.set_members([Member(f"r{rank}", rank) for rank in self._ranks])

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self._route(request, request.adapter, now_s)

    def _route(self, request: SimulatedRequest, adapter: str | None, now_s: float) -> tuple[int, Sequence[int]]:
        self._now_s = now_s
        choice = self._views[request.gateway].route(RoutingHint(request.id, adapter, request.tokens))
        return self._ranks[choice.order[0]], [int(replica[1:]) for replica in choice.prefetch]

    def complete(self, request: SimulatedRequest, rank: int | None, load: QueueLoad | None, now_s: float) -> None:
        """Handles an answer to a request from the replica of this rank, or the replica's loss (None)."""
        self._now_s = now_s
        self._views[request.gateway].complete(request.id, None if rank is None else f"r{rank}", load)

    def on_report(self, report: StateReport, now_s: float, age_s: float) -> None:
        """Handles a report that reaches every gateway."""
        self._now_s = now_s
        for gateway, view in enumerate(self._views):
            view.on_report(report, str(gateway), age_s)


class LeastSeen(Ours):
    """The replica that seems least loaded to one of several gateways, whatever the adapter: ranklet's rule for base
    requests.
    """

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self._route(request, None, now_s)


class _Watching:
    """Rules that look at the replicas themselves."""

    def __init__(self, seed: int = 0) -> None:
        self._engines: Sequence[SimulatedEngine | None] = ()
        self._up: list[int] = []
        self._random = random.Random(seed)

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        self._engines = engines
        self._up = [rank for rank, engine in enumerate(engines) if engine is not None]

    def _queue(self, rank: int) -> int:
        engine = self._engines[rank]
        assert engine is not None
        return len(engine.queue) + len(engine.running)

    def _shorter(self, among: Sequence[int]) -> int:
        if len(among) == 1:
            return among[0]
        one, other = self._random.sample(among, 2)
        return one if self._queue(one) <= self._queue(other) else other


class RoundRobin(_Watching):
    """Each in turn."""

    _turn = -1

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        self._turn += 1
        return self._up[self._turn % len(self._up)], ()


class PowerOfTwo(_Watching):
    """The shorter queue of two at random: Ray Serve's default."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        return self._shorter(self._up), ()


class Multiplex(_Watching):
    """Ray Serve's multiplexing: the shorter queue of two that hold the adapter; where all of them have `most` requests,
    or none holds it, of those with the fewest adapters.

    Serve lets a request wait up to a second for a holder before it goes elsewhere; here it goes at once.
    """

    def __init__(self, most: int = 16, seed: int = 0) -> None:
        super().__init__(seed)
        self._most = most  # `max_ongoing_requests`: three batches of prompts of 6,000 tokens
        self._holders: dict[str, dict[int, None]] = {}

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().set_replicas(engines, now_s)
        self._holders.clear()

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        name = request.adapter
        if name is None:
            return self._shorter(self._up), ()
        held = self._holders[name] = {rank: None for rank in self._holders.get(name, ()) if self._has(rank, name)}
        free = [rank for rank in held if self._queue(rank) < self._most]
        if not free:
            sample = self._random.sample(self._up, min(64, len(self._up)))
            fewest = min(self._models(rank) for rank in sample)
            free = [rank for rank in sample if self._models(rank) == fewest]
        chosen = self._shorter(free)
        held[chosen] = None
        return chosen, ()

    def _has(self, rank: int, name: str) -> bool:
        engine = self._engines[rank]
        return engine is not None and (name in engine.resident or name in engine.loading or name in engine.wanted)

    def _models(self, rank: int) -> int:
        engine = self._engines[rank]
        assert engine is not None
        return len(engine.resident) + len(engine.loading)


class ConsistentHash(_Watching):
    """Each adapter at its one place."""

    def set_replicas(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().set_replicas(engines, now_s)
        self._salts = rendezvous.salted(self._up)
        self._place: dict[str, int] = {}

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        name = request.adapter or ""
        if name not in self._place:
            self._place[name] = self._up[int(rendezvous.order(name, self._salts)[0])]
        return self._place[name], ()


class LeastLoaded(_Watching):
    """The fewest tokens waiting, known exactly and at once, which no gateway of several can."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        # One of equals at random, or the first replicas would do all the work of a quiet cluster.
        start = self._random.randrange(len(self._up))
        best, least = -1, 1 << 60
        for k in range(len(self._up)):
            rank = self._up[(start + k) % len(self._up)]
            engine = self._engines[rank]
            if engine is not None and engine.queued_tokens < least:
                best, least = rank, engine.queued_tokens
                if not least:
                    break
        return best, ()
