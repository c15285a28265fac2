"""Discrete-event simulation of replicas and gateways with the real routing policy.

Requests reach their replica after 0.5 ms and answers reach their gateway at once. Reports take 5 ms. A
replica sends one after a change, at the intervals of a real replica.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ranklet.routing import report
from ranklet.routing.report import Holdings, QueueLoad, StateReport
from ranklet.routing.simulate.conversations import TextTraffic
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest, Speed
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import RankletRule, Rule
from ranklet.routing.simulate.traffic import Traffic

_REPORT_DELAY_S = 0.005
_TAIL_S = 60.0  # simulated after the last arrival
_REQUEST_DELAY_S = 0.0005
_POOL_RANK = 64
_PROGRESS_S = 0.5

_Event = Callable[[float], None]  # called with the time of the event


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """The cluster, and the events that change it.

    Attributes:
        recently_used_s: see `SimulatedEngine`. The caller passes the value of real replicas, which this room does not
            import.
        hosted: adapters in a replica's host cache.
        lose, join: (second, ranks) of replicas that die, and of replicas that start without adapters.
        late_s: additional delay of reports.
        warm_s: results before this time are not counted.
    """

    replicas: int
    recently_used_s: float
    slots: int = 64
    hosted: int = 256
    gateways: int = 8
    speed: Speed = field(default_factory=Speed)
    lose: tuple[float, tuple[int, ...]] | None = None
    join: tuple[float, tuple[int, ...]] | None = None
    late_s: float = 0.0
    warm_s: float = 0.0


class Simulator:
    """One run of one rule."""

    def __init__(self, cluster: SimulatedCluster, rule: Rule, traffic: Traffic | TextTraffic, name: str) -> None:
        self._cluster = cluster
        self._traffic = traffic
        self._rule = rule
        self._ranklet = rule if isinstance(rule, RankletRule) else None
        joining = set(cluster.join[1]) if cluster.join else set()
        lost = set(cluster.lose[1]) if cluster.lose else set()
        self._engines: list[SimulatedEngine | None] = [
            None if rank in joining - lost else self._new_engine() for rank in range(cluster.replicas)
        ]
        self._all_engines = [[engine] if engine else [] for engine in self._engines]  # dead ones too, by rank
        self._calendar: list[tuple[float, int, _Event]] = []
        self._numbers = itertools.count()
        self._pick_gateway = random.Random(traffic.seed)
        self._gateways = tuple(str(gateway) for gateway in range(cluster.gateways))
        self._seconds = traffic.seconds
        self._last_reports: dict[int, tuple[int, int, float]] = {}  # by rank: changes, wait level and time
        self._reporting: dict[int, float] = {}  # by rank: time of the next report, if one is on the calendar
        self._result = self._new_result(name)

    def _new_engine(self) -> SimulatedEngine:
        cluster = self._cluster
        return SimulatedEngine(cluster.slots, cluster.hosted, cluster.speed, cluster.recently_used_s)

    def _new_result(self, name: str) -> SimulationResult:
        return SimulationResult(name, self._cluster.warm_s, seconds=self._seconds)

    def run(self, on_progress: Callable[[float], None] = lambda now_s: None) -> SimulationResult:
        self._rule.set_replicas(self._engines, 0.0)
        for change, apply in ((self._cluster.lose, self._lose), (self._cluster.join, self._join)):
            if change:
                self._schedule(change[0], partial(apply, ranks=change[1]))
        warm: tuple[list[float], int] | None = None
        progress_s = 0.0
        for now_s, event in self._events():
            if warm is None and now_s >= self._cluster.warm_s:
                warm = self._totals()
            if now_s - progress_s > _PROGRESS_S:
                on_progress(now_s)
                progress_s = now_s
            event(now_s)
        self._add_unfinished()
        busy_s, loads = self._totals()
        warm_busy_s, warm_loads = warm or ([0.0] * len(busy_s), 0)
        self._result.busy_s = [end_s - start_s for end_s, start_s in zip(busy_s, warm_busy_s, strict=True)]
        self._result.loads = loads - warm_loads
        return self._result

    def _totals(self) -> tuple[list[float], int]:
        busy_s = [sum(engine.busy_s for engine in engines) for engines in self._all_engines]
        return busy_s, sum(engine.loads for engines in self._all_engines for engine in engines)

    def _add_unfinished(self) -> None:
        end_s = self._seconds + _TAIL_S
        for engine in filter(None, self._engines):
            for request in (*engine.running, *engine.queue):
                self._result.unfinished += 1
                self._result.add_request(request.arrived_s, end_s - request.arrived_s, request.hit)

    def _events(self) -> Iterator[tuple[float, _Event]]:
        """Yield the events in order of time. Arrivals are drawn only when they are next."""
        arrivals = self._arrivals()
        arrival = next(arrivals, None)
        while arrival is not None or self._calendar:
            if arrival is not None and (not self._calendar or arrival[0] <= self._calendar[0][0]):
                yield arrival
                arrival = next(arrivals, None)
            else:
                at_s, _, event = heapq.heappop(self._calendar)
                if at_s <= self._seconds + _TAIL_S:
                    yield at_s, event

    def _arrivals(self) -> Iterator[tuple[float, _Event]]:
        assert isinstance(self._traffic, Traffic)
        for id, (at_s, adapter, tokens) in enumerate(self._traffic.draw()):
            request = SimulatedRequest(id, adapter, tokens, self._draw_gateway(), at_s)
            yield at_s, partial(self._send, request=request)

    def _draw_gateway(self) -> int:
        return self._pick_gateway.randrange(self._cluster.gateways)

    def _schedule(self, at_s: float, event: _Event) -> None:
        heapq.heappush(self._calendar, (at_s, next(self._numbers), event))

    def _alive(self, rank: int) -> SimulatedEngine:
        engine = self._engines[rank]
        assert engine is not None
        return engine

    # Requests

    def _send(self, now_s: float, request: SimulatedRequest) -> None:
        rank, prefetch = self._rule.choose(request, now_s)
        for other in prefetch:
            self._schedule_loads(now_s, other, self._alive(other).prefetch(request.adapter or "", now_s))
        arrive = partial(self._arrive, rank=rank, engine=self._alive(rank), request=request)
        self._schedule(now_s + _REQUEST_DELAY_S, arrive)

    def _arrive(self, now_s: float, rank: int, engine: SimulatedEngine, request: SimulatedRequest) -> None:
        if self._engines[rank] is not engine:
            self._result.resent += 1
            self._send(now_s, request)
            return
        engine.add_request(request)
        if not request.hit:
            self._schedule_loads(now_s, rank, engine.start_loads())
        self._continue(now_s, rank, engine)

    def _continue(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        batch_s = engine.start_batch(now_s)
        if batch_s is not None:
            self._schedule(now_s + batch_s, partial(self._finish_batch, rank=rank, engine=engine))
        if self._ranklet:
            self._schedule_report(now_s, rank, engine)

    def _schedule_loads(self, now_s: float, rank: int, loads: list[tuple[str, float]]) -> None:
        for name, load_s in loads:
            complete = partial(self._complete_load, rank=rank, engine=self._alive(rank), name=name)
            self._schedule(now_s + load_s, complete)

    def _complete_load(self, now_s: float, rank: int, engine: SimulatedEngine, name: str) -> None:
        if self._engines[rank] is engine:
            engine.complete_load(name, now_s)
            self._schedule_loads(now_s, rank, engine.start_loads())
            self._continue(now_s, rank, engine)

    def _finish_batch(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        if self._engines[rank] is not engine:
            return
        for request in engine.finish_batch():
            self._result.add_request(request.arrived_s, request.began_s - request.arrived_s, request.hit)
            if self._ranklet:
                load = None if self._cluster.late_s else self._load(engine, request.gateway)
                self._ranklet.complete(request, rank, load, now_s)
        if engine.waiting:
            self._schedule_loads(now_s, rank, engine.start_loads())
        self._continue(now_s, rank, engine)

    # Reports

    def _load(self, engine: SimulatedEngine, gateway: int) -> QueueLoad:
        number, received = next(self._numbers), engine.received_tokens[gateway]
        return QueueLoad(number, engine.queued_tokens, engine.speed.tokens_per_s, engine.done_tokens, received)

    def _schedule_report(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        """Schedule a report if something has changed since the last one, no earlier than its interval allows."""
        changes, level, last_s = self._last_reports.get(rank, (-1, 0, -report.REPORT_INTERVAL_S))
        if engine.changes != changes or self._wait_level(engine) != level:
            interval_s = report.min_report_interval_s(self._cluster.gateways)
        elif (news_s := self._news_interval_s(engine)) is not None:
            interval_s = news_s
        else:
            return
        at_s = max(now_s, last_s + interval_s)
        if at_s < self._reporting.get(rank, math.inf):
            self._reporting[rank] = at_s
            self._schedule(at_s, partial(self._report, rank=rank, engine=engine))

    def _news_interval_s(self, engine: SimulatedEngine) -> float | None:
        """Return how long after the last report other news is sent; None without any."""
        return None

    def _report(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        if self._reporting.get(rank) == now_s:
            del self._reporting[rank]
        if self._engines[rank] is not engine:
            return
        self._last_reports[rank] = engine.changes, self._wait_level(engine), now_s
        holdings = Holdings(
            next(self._numbers), frozenset(engine.resident), frozenset(engine.loading), frozenset(engine.hosted),
            engine.slots, engine.used_slots(now_s), _POOL_RANK, engine.speed.disk_s, engine.speed.host_s,
        )  # fmt: skip
        received = {str(gateway): tokens for gateway, tokens in engine.received_tokens.items()}
        prefixes = self._prefixes(engine, now_s)
        sent = StateReport(f"r{rank}", self._load(engine, -1), holdings, self._gateways, received, prefixes)
        delay_s = _REPORT_DELAY_S + self._cluster.late_s
        deliver = partial(self._deliver_report, rank=rank, engine=engine, sent=sent, age_s=delay_s)
        self._schedule(now_s + delay_s, deliver)

    def _wait_level(self, engine: SimulatedEngine) -> int:
        return report.wait_level(engine.queued_tokens / engine.speed.tokens_per_s)

    def _prefixes(self, engine: SimulatedEngine, now_s: float) -> report.PrefixNews | None:
        return None

    def _deliver_report(
        self, now_s: float, rank: int, engine: SimulatedEngine, sent: StateReport, age_s: float
    ) -> None:
        if self._engines[rank] is engine and self._ranklet:
            self._ranklet.on_report(sent, now_s, age_s)

    # Membership

    def _lose(self, now_s: float, ranks: tuple[int, ...]) -> None:
        lost = [self._engines[rank] for rank in ranks]
        for rank in ranks:
            self._engines[rank] = None
            self._last_reports.pop(rank, None)
        self._rule.set_replicas(self._engines, now_s)
        for engine in lost:
            for request in [*engine.running, *engine.queue] if engine else ():
                self._result.resent += 1
                request.restart()
                if self._ranklet:
                    self._ranklet.complete(request, None, None, now_s)
                self._send(now_s, request)

    def _join(self, now_s: float, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            engine = self._engines[rank] = self._new_engine()
            self._all_engines[rank].append(engine)
        self._rule.set_replicas(self._engines, now_s)
