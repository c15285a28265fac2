"""The simulation: discrete events around the real policy objects.

Requests reach their replica at once and answers their gateway too; what replicas push takes `PUSH_S`, after a change
and not more often than the real one.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ranklet.routing.report import (
    REPORT_INTERVAL_S,
    Holdings,
    QueueLoad,
    StateReport,
    min_report_interval_s,
    wait_level,
)
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest, Speed
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import Ours, Rule
from ranklet.routing.simulate.traffic import Traffic

PUSH_S = 0.005
TAIL_S = 60.0  # simulated after the last arrival
_NETWORK_S = 0.0005  # from gateway to replica


_Event = Callable[[float], None]  # told the time


@dataclass(frozen=True, slots=True)
class Setting:
    """The cluster, and what happens to it.

    Attributes:
        lose, join: (second, ranks): replicas that die, and replicas that come (again), empty.
        late_s: how much later than in reality news reaches the gateways.
    """

    replicas: int
    slots: int = 64
    hosted: int = 256  # adapters in a host cache
    gateways: int = 8
    speed: Speed = field(default_factory=Speed)
    lose: tuple[float, tuple[int, ...]] | None = None
    join: tuple[float, tuple[int, ...]] | None = None
    late_s: float = 0.0
    warm_s: float = 0.0


class World:
    """One run of one rule."""

    def __init__(self, setting: Setting, rule: Rule, traffic: Traffic, name: str) -> None:
        self._setting = setting
        self._rule = rule
        self._ours = rule if isinstance(rule, Ours) else None
        later = set(setting.join[1]) if setting.join else set()
        lost = set(setting.lose[1]) if setting.lose else set()
        self.engines: list[SimulatedEngine | None] = [
            None if rank in later - lost else self._new() for rank in range(setting.replicas)
        ]
        self._all = [[engine] if engine else [] for engine in self.engines]
        self._calendar: list[tuple[float, int, _Event]] = []
        self._numbers = itertools.count()
        self._gateway = random.Random(traffic.seed)
        self._gateways = tuple(str(gateway) for gateway in range(setting.gateways))
        self._requests = traffic.draw()
        self._seconds = traffic.seconds
        self._told: dict[int, tuple[int, int, float]] = {}  # changes, level and time of the last push, by rank
        self._telling: set[int] = set()
        self.outcome = SimulationResult(name, setting.warm_s, seconds=traffic.seconds)

    def _new(self) -> SimulatedEngine:
        return SimulatedEngine(self._setting.slots, self._setting.hosted, self._setting.speed)

    def run(self, progress: Callable[[float], None] = lambda now_s: None) -> SimulationResult:
        """To the end; `progress` is told the simulated time now and then."""
        self._rule.set_replicas(self.engines, 0.0)
        for happening, react in ((self._setting.lose, self._lose), (self._setting.join, self._join)):
            if happening:
                self._at(happening[0], partial(react, ranks=happening[1]))
        warm: tuple[list[float], int] | None = None
        told_s = 0.0
        for now_s, act in self._events():
            if warm is None and now_s >= self._setting.warm_s:
                warm = self._work()
            if now_s - told_s > 0.5:
                progress(now_s)
                told_s = now_s
            act(now_s)
        for request in [r for engine in self.engines if engine for r in (*engine.running, *engine.queue)]:
            self.outcome.unfinished += 1
            self.outcome.enter(request.arrived_s, self._seconds + TAIL_S - request.arrived_s, request.hit)
        busy, loads = self._work()
        before, loads_before = warm or ([0.0] * len(busy), 0)
        self.outcome.busy = [now - was for now, was in zip(busy, before, strict=True)]
        self.outcome.loads = loads - loads_before
        return self.outcome

    def _work(self) -> tuple[list[float], int]:
        """How long each place has been busy, and all loads so far, of those that are gone too."""
        return [sum(e.busy_s for e in every) for every in self._all], sum(e.loads for every in self._all for e in every)

    def _events(self) -> Iterator[tuple[float, _Event]]:
        """What happens, in order of time: arrivals are drawn as they come due."""
        ids = itertools.count()
        due = next(self._requests, None)
        while due is not None or self._calendar:
            if due is not None and (not self._calendar or due[0] <= self._calendar[0][0]):
                at_s, adapter, tokens = due
                request = SimulatedRequest(
                    next(ids), adapter, tokens, self._gateway.randrange(self._setting.gateways), at_s
                )
                due = next(self._requests, None)
                yield at_s, partial(self._send, request=request)
            else:
                at_s, _, act = heapq.heappop(self._calendar)
                if at_s <= self._seconds + TAIL_S:
                    yield at_s, act

    def _at(self, when_s: float, act: _Event) -> None:
        heapq.heappush(self._calendar, (when_s, next(self._numbers), act))

    # Events

    def _send(self, now_s: float, request: SimulatedRequest) -> None:
        rank, prefetch = self._rule.choose(request, now_s)
        for other in prefetch:
            self._start(now_s, other, self._alive(other).offer(request.adapter or "", now_s))
        self._at(now_s + _NETWORK_S, partial(self._arrive, rank=rank, engine=self._alive(rank), request=request))

    def _arrive(self, now_s: float, rank: int, engine: SimulatedEngine, request: SimulatedRequest) -> None:
        if self.engines[rank] is not engine:
            self.outcome.lost += 1
            self._send(now_s, request)
            return
        engine.take(request)
        if not request.hit:
            self._start(now_s, rank, engine.bring())
        self._go_on(now_s, rank, engine)

    def _go_on(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        took_s = engine.launch(now_s)
        if took_s is not None:
            self._at(now_s + took_s, partial(self._batch, rank=rank, engine=engine))
        if self._ours:
            self._tell_soon(now_s, rank, engine)

    def _start(self, now_s: float, rank: int, loads: list[tuple[str, float]]) -> None:
        for name, seconds in loads:
            self._at(now_s + seconds, partial(self._loaded, rank=rank, engine=self._alive(rank), name=name))

    def _loaded(self, now_s: float, rank: int, engine: SimulatedEngine, name: str) -> None:
        if self.engines[rank] is engine:
            engine.loaded(name, now_s)
            self._start(now_s, rank, engine.bring())
            self._go_on(now_s, rank, engine)

    def _batch(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        if self.engines[rank] is not engine:
            return
        batch = engine.finish()
        for request in batch:
            self.outcome.enter(request.arrived_s, request.began_s - request.arrived_s, request.hit)
            if self._ours:
                load = None if self._setting.late_s else self._load(engine, request.gateway)
                self._ours.complete(request, rank, load, now_s)
        if engine.wanted:
            self._start(now_s, rank, engine.bring())
        self._go_on(now_s, rank, engine)

    def _alive(self, rank: int) -> SimulatedEngine:
        engine = self.engines[rank]
        assert engine is not None
        return engine

    def _load(self, engine: SimulatedEngine, gateway: int) -> QueueLoad:
        number, received = next(self._numbers), engine.received[gateway]
        return QueueLoad(number, engine.queued_tokens, engine.speed.tokens_per_s, engine.done_tokens, received)

    def _tell_soon(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        """Push if something worth telling has changed, not before its turn."""
        if rank in self._telling:
            return
        changes, waits, told_s = self._told.get(rank, (-1, 0, -REPORT_INTERVAL_S))
        if engine.changes != changes or self._level(engine) != waits:
            self._telling.add(rank)
            earliest_s = told_s + min_report_interval_s(self._setting.gateways)
            self._at(max(now_s, earliest_s), partial(self._tell, rank=rank, engine=engine))

    @staticmethod
    def _level(engine: SimulatedEngine) -> int:
        return wait_level(engine.queued_tokens / engine.speed.tokens_per_s)

    def _tell(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        """What a replica says now reaches the gateways soon."""
        self._telling.discard(rank)
        if self.engines[rank] is not engine:
            return
        self._told[rank] = engine.changes, self._level(engine), now_s
        held = Holdings(
            next(self._numbers), frozenset(engine.resident), frozenset(engine.loading), frozenset(engine.hosted),
            engine.slots, engine.used_slots(now_s), 64, engine.speed.disk_s, engine.speed.host_s,
        )  # fmt: skip
        received = {str(gateway): tokens for gateway, tokens in engine.received.items()}
        said = StateReport(f"r{rank}", self._load(engine, -1), held, self._gateways, received)
        late_s = PUSH_S + self._setting.late_s
        self._at(now_s + late_s, partial(self._heard, rank=rank, engine=engine, said=said, late_s=late_s))

    def _heard(self, now_s: float, rank: int, engine: SimulatedEngine, said: StateReport, late_s: float) -> None:
        if self.engines[rank] is engine and self._ours:
            self._ours.on_report(said, now_s, late_s)

    def _lose(self, now_s: float, ranks: tuple[int, ...]) -> None:
        """Replicas die; what they had is sent again, as gateways do."""
        lost = [self.engines[rank] for rank in ranks]
        for rank in ranks:
            self.engines[rank] = None
            self._told.pop(rank, None)
        self._rule.set_replicas(self.engines, now_s)
        for engine in lost:
            for request in [*engine.running, *engine.queue] if engine else ():
                self.outcome.lost += 1
                if self._ours:
                    self._ours.complete(request, None, None, now_s)
                self._send(now_s, request)

    def _join(self, now_s: float, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            engine = self.engines[rank] = self._new()
            self._all[rank].append(engine)
        self._rule.set_replicas(self.engines, now_s)
