"""The simulation of conversations: `Simulator` with replicas that make texts."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from ranklet.routing.prefix import PAGE_TOKENS
from ranklet.routing.report import NEWS_INTERVAL_S, PrefixNews, QueueLoad, wait_level
from ranklet.routing.simulate.conversations import Conversation, Conversations, SimulatedText, TextTraffic
from ranklet.routing.simulate.engine import SimulatedEngine
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.rules import Rule
from ranklet.routing.simulate.simulator import SimulatedCluster, Simulator
from ranklet.routing.simulate.text_engine import SimulatedTextEngine
from ranklet.routing.simulate.text_outcome import TextResult


class TextSimulator(Simulator):
    """One run of one rule with conversations. The next question of each comes a while after the last answer."""

    def __init__(self, cluster: SimulatedCluster, rule: Rule, traffic: TextTraffic, name: str) -> None:
        super().__init__(cluster, rule, traffic, name)
        self._conversations = Conversations(traffic)
        self._ids = itertools.count()
        self._talks: dict[int, Conversation] = {}  # by the id of the open turn

    def _new_engine(self) -> SimulatedEngine:
        cluster = self._cluster
        return SimulatedTextEngine(cluster.slots, cluster.hosted, cluster.speed, cluster.recently_used_s)

    def _new_result(self, name: str) -> SimulationResult:
        return TextResult(name, self._cluster.warm_s, seconds=self._seconds)

    def _arrivals(self) -> Iterator[tuple[float, Callable[[float], None]]]:
        for at_s, talk in self._conversations.starts():
            yield at_s, partial(self._ask, talk=talk)

    def _ask(self, now_s: float, talk: Conversation) -> None:
        if now_s > self._seconds:
            return
        text = self._conversations.next_turn(talk, next(self._ids), self._draw_gateway(), now_s)
        self._talks[text.id] = talk
        self._send(now_s, text)

    def _finish_batch(self, now_s: float, rank: int, engine: SimulatedEngine) -> None:
        if self._engines[rank] is not engine:
            return
        assert isinstance(engine, SimulatedTextEngine)
        assert isinstance(self._result, TextResult)
        self._result.add_step(now_s, engine.step_length_s, engine.decodes)
        ended = engine.finish_step(now_s)
        for text in engine.begun:
            if self._ranklet:
                self._ranklet.begin(text, now_s)
        for text in ended:
            self._on_end(now_s, rank, engine, text)
        if engine.waiting:
            self._schedule_loads(now_s, rank, engine.start_loads())
        self._continue(now_s, rank, engine)

    def _on_end(self, now_s: float, rank: int, engine: SimulatedTextEngine, text: SimulatedText) -> None:
        assert isinstance(self._result, TextResult)
        self._result.add_text(text, now_s)
        if self._ranklet:
            load = None if self._cluster.late_s else self._load(engine, text.gateway)
            self._ranklet.complete(text, rank, load, now_s, text.cached)
        talk = self._talks.pop(text.id)
        if talk.turns:
            self._schedule(now_s + self._conversations.pause_s(), partial(self._ask, talk=talk))

    def _totals(self) -> tuple[list[float], int]:
        assert isinstance(self._result, TextResult)
        engines = [each for rank in self._all_engines for each in rank if isinstance(each, SimulatedTextEngine)]
        self._result.preemptions = sum(each.preemptions for each in engines)
        return [each.work_s for each in engines], sum(each.loads for each in engines)

    # Reports

    def _load(self, engine: SimulatedEngine, gateway: int) -> QueueLoad:
        assert isinstance(engine, SimulatedTextEngine)
        measured, rows = engine.measured, engine.text_speed.rows
        return QueueLoad(
            next(self._numbers), engine.waiting_work, engine.work_per_s, engine.done_tokens,
            engine.received_tokens[gateway], 0.0, engine.decodes, measured.text_work,
            engine.pages.available * PAGE_TOKENS - engine.waiting_work, measured.freed_per_s(engine.decodes),
            rows - engine.open_requests, measured.ended_per_s(rows),
        )  # fmt: skip

    def _wait_level(self, engine: SimulatedEngine) -> int:
        assert isinstance(engine, SimulatedTextEngine)
        return wait_level(engine.outstanding / engine.work_per_s)

    def _news_interval_s(self, engine: SimulatedEngine) -> float | None:
        assert isinstance(engine, SimulatedTextEngine)
        return NEWS_INTERVAL_S if len(engine.news) else None

    def _prefixes(self, engine: SimulatedEngine, now_s: float) -> PrefixNews:
        assert isinstance(engine, SimulatedTextEngine)
        return PrefixNews(engine.news.take(), now_s - engine.pages.kept_since_s)
