"""The rules that are compared: ours, and what others route by. The others see every replica's queue without delay."""

import random
from collections.abc import Sequence
from typing import Protocol

from ranklet.routing import rendezvous
from ranklet.routing.affinity import Affinity, Policy
from ranklet.routing.fleet import Member
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest


class Rule(Protocol):
    """How the gateways choose a replica."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        """The replica for a request, and replicas that should load its adapter ahead of requests."""
        ...

    def joined(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        """The replicas, by rank; None for one that is gone."""
        ...


class Ours:
    """One `Affinity` a gateway, each with its own view."""

    def __init__(self, gateways: int, policy: Policy = Policy()) -> None:
        self.views = [Affinity(policy) for _ in range(gateways)]
        for turn, view in enumerate(self.views):
            view.fleet.share(gateways, turn)
        self._ranks: list[int] = []

    def joined(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        self._ranks = [rank for rank, engine in enumerate(engines) if engine is not None]
        for view in self.views:
            view.fleet.join([Member(f"r{rank}", rank) for rank in self._ranks], now_s)

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        view = self.views[request.gateway]
        choice = view.choose(request.adapter, request.tokens, now_s)
        view.fleet.sent(request.id, choice.order[0], request.tokens, now_s)
        return self._ranks[choice.order[0]], [int(replica[1:]) for replica in choice.prefetch]


class LeastSeen(Ours):
    """The replica that seems least loaded to one of several gateways, whatever the adapter: our rule for the base."""

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Sequence[int]]:
        view = self.views[request.gateway]
        best = view.choose(None, request.tokens, now_s).order[0]
        view.fleet.sent(request.id, best, request.tokens, now_s)
        return self._ranks[best], ()


class _Watching:
    """Rules that look at the replicas themselves."""

    def __init__(self, seed: int = 0) -> None:
        self._engines: Sequence[SimulatedEngine | None] = ()
        self._up: list[int] = []
        self._random = random.Random(seed)

    def joined(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
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

    def joined(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().joined(engines, now_s)
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

    def joined(self, engines: Sequence[SimulatedEngine | None], now_s: float) -> None:
        super().joined(engines, now_s)
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
