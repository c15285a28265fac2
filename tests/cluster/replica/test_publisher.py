"""When a replica's state is published: at each change, neither too often nor too rarely."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from ranklet.cluster.replica.publisher import StatePublisher
from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.adapters.reference import HeldAdapters
from ranklet.replicas.engine.stats import BatchRecord, CacheRoom
from ranklet.routing.report import NEWS_INTERVAL_S, StateReport
from tests.virtual_time import run_in_virtual_time

HEARTBEAT_S = 1.0
SHORTEST_S = 0.05
GATEWAYS = ("g1", "g2")


@dataclass
class PublisherSite:
    """A publisher in virtual time, and the reports that it has sent."""

    state: ReplicaState = field(default_factory=lambda: ReplicaState("r", 4, 64))
    gateways: Sequence[str] = GATEWAYS
    responsive: bool = True
    failing: bool = False
    sent: list[tuple[float, StateReport]] = field(default_factory=list)

    async def send(self, report: StateReport) -> Sequence[str]:
        self.sent.append((asyncio.get_running_loop().time(), report))
        if self.failing:
            raise ConnectionError
        return self.gateways

    @contextlib.asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        task = asyncio.create_task(StatePublisher(self.state, self.send, lambda: self.responsive).run())
        await asyncio.sleep(HEARTBEAT_S / 2)  # the first report has gone out
        try:
            yield
        finally:
            task.cancel()

    def times(self) -> list[float]:
        """Return the times of all reports, in seconds since the first."""
        return [round(at_s - self.sent[0][0], 6) for at_s, _ in self.sent]

    def hold(self, *names: str) -> None:
        self.state.holdings_changed(HeldAdapters(names, (), (), len(names)))


def test_without_changes_a_report_goes_out_at_each_heartbeat() -> None:
    async def run() -> None:
        site = PublisherSite()
        async with site.publishing():
            await asyncio.sleep(3 * HEARTBEAT_S)
        assert site.times() == [0, HEARTBEAT_S, 2 * HEARTBEAT_S, 3 * HEARTBEAT_S]

    run_in_virtual_time(run())


def test_a_change_is_reported_at_once_and_the_changes_after_it_together() -> None:
    async def run() -> None:
        site = PublisherSite()
        async with site.publishing():
            for names in ("a", "ab", "abc"):
                change = threading.Thread(target=site.hold, args=tuple(names))  # as the engine's process does
                change.start()
                change.join()
                await asyncio.sleep(SHORTEST_S / 5)
            await asyncio.sleep(HEARTBEAT_S / 2)
        assert site.times() == [0, HEARTBEAT_S / 2, HEARTBEAT_S / 2 + SHORTEST_S]
        assert [sorted(report.holdings.resident) for _, report in site.sent] == [[], ["a"], ["a", "b", "c"]]
        assert [report.gateways for _, report in site.sent] == [(), GATEWAYS, GATEWAYS]

    run_in_virtual_time(run())


@pytest.mark.parametrize(("answers", "reports"), [(0, 2), (1, 2), (2, 1)])
def test_another_level_of_the_wait_is_reported_unless_answers_carried_it(answers: int, reports: int) -> None:
    async def run() -> None:
        site = PublisherSite()
        site.state.batch(BatchRecord({"": 1}, {"": 1000}, "none", [], 1.0))
        async with site.publishing():
            for _ in range(answers):
                site.state.load_for("g1")
            site.state.call_arrived("g1", 10_000)
            await asyncio.sleep(HEARTBEAT_S / 4)
        assert len(site.sent) == reports

    run_in_virtual_time(run())


def test_nothing_is_sent_while_the_engine_does_not_respond() -> None:
    async def run() -> None:
        site = PublisherSite()
        async with site.publishing():
            site.responsive = False
            site.hold("a")
            await asyncio.sleep(5 * HEARTBEAT_S)
            assert site.times() == [0]
            site.responsive = True
            await asyncio.sleep(SHORTEST_S)
        assert len(site.sent) == 2
        assert site.sent[1][1].holdings.resident == {"a"}

    run_in_virtual_time(run())


def test_a_failure_to_send_does_not_end_the_reports(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        site = PublisherSite(failing=True)
        async with site.publishing():
            site.failing = False
            await asyncio.sleep(HEARTBEAT_S)
        assert site.times() == [0, HEARTBEAT_S]

    run_in_virtual_time(run())
    assert "was not sent" in caplog.text


def test_with_many_gateways_reports_are_further_apart() -> None:
    async def run() -> None:
        site = PublisherSite(gateways=[f"g{number:03}" for number in range(100)])
        async with site.publishing():
            await asyncio.sleep(4 * HEARTBEAT_S)
            site.hold("a")
            await asyncio.sleep(0.3)
            site.hold("b")
            await asyncio.sleep(0.3)
        assert site.times() == [0, 2.0, 4.0, 4.5, 5.0]

    run_in_virtual_time(run())


def test_news_of_prefixes_is_sent_earlier_than_the_next_heartbeat() -> None:
    async def run() -> None:
        site = PublisherSite()
        site.state.batch(BatchRecord({}, {}, "none", [], 0.01, {}, CacheRoom(640, 1.0)))
        async with site.publishing():
            site.hold("a")
            site.state.text_begun(0, 0, [5])
            await asyncio.sleep(SHORTEST_S / 2)
            site.state.text_begun(0, 0, [6])
            await asyncio.sleep(HEARTBEAT_S / 2)
        assert site.times() == [0, HEARTBEAT_S / 2, HEARTBEAT_S / 2 + NEWS_INTERVAL_S]
        assert [report.prefixes and report.prefixes.pages for _, report in site.sent] == [(), (5,), (6,)]

    run_in_virtual_time(run())
