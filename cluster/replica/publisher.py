"""Publishes the state of a replica to all gateways: at each change, and at least once a second."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from ranklet.cluster.replica.state import ReplicaState
from ranklet.routing.report import NEWS_INTERVAL_S, REPORT_INTERVAL_S, StateReport, min_report_interval_s

logger = logging.getLogger("ray.serve")


class StatePublisher:
    """Sends state reports from the replica's event loop.

    Changes within the shortest interval between two reports are merged into one report. Sending takes about 0.45 ms of
    the event loop for each gateway (Ray 2.60), so reports at the shortest interval take up to 9 % of its time.

    Args:
        state: source of the reports; it wakes the publisher.
        send: sends a report to all gateways and returns the ids of those that it reached.
        is_responsive: whether the engine responds. While it does not, no reports are sent, so that the gateways
            consider the replica hung.
    """

    def __init__(
        self, state: ReplicaState, send: Callable[[StateReport], Awaitable[Sequence[str]]],
        is_responsive: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._state = state
        self._send = send
        self._is_responsive = is_responsive
        self._gateways: tuple[str, ...] = ()
        self._sent_holdings = -1
        self._sent_level = 0
        self._sent_loads = 0

    async def run(self) -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(changed.set)

        self._state.subscribe(wake)
        while True:
            began_s = loop.time()
            if self._is_responsive():
                await self._publish()
            shortest_s = min_report_interval_s(len(self._gateways))
            await asyncio.sleep(shortest_s)
            with contextlib.suppress(TimeoutError):
                interval_s = NEWS_INTERVAL_S if self._state.has_news else REPORT_INTERVAL_S
                async with asyncio.timeout_at(began_s + max(interval_s, 4 * shortest_s)):
                    await self._wait_for_news(changed)

    async def _wait_for_news(self, changed: asyncio.Event) -> None:
        changed.clear()
        while not self._has_news():
            await changed.wait()
            changed.clear()

    def _has_news(self) -> bool:
        if self._state.holdings_number != self._sent_holdings:
            return True
        answers = self._state.loads_sent - self._sent_loads
        # Each answer to a gateway contains the load too: after as many answers as gateways, most of them have it.
        return self._state.level() != self._sent_level and answers < len(self._gateways)

    async def _publish(self) -> None:
        report = self._state.report(self._gateways)
        self._sent_holdings, self._sent_level = report.holdings.number, self._state.level()
        self._sent_loads = report.load.number
        try:
            reached = await self._send(report)
        except Exception:
            logger.exception("the state report was not sent")
        else:
            self._gateways = tuple(sorted(reached)) or self._gateways
