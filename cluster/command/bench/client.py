"""One process of the load client: sends its share of the requests and records when and how each was answered.

Imports neither torch nor Ray. Each process measures its own CPU time and delays.
"""

import asyncio
import contextlib
import gc
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

import aiohttp

from ranklet.cluster.command.bench.answer import check_answer
from ranklet.cluster.command.bench.requests import PlannedRequest

_START_DELAY_S = 0.05
_PROGRESS_INTERVAL_S = 0.2
_TICK_S = 0.01


@dataclass(frozen=True, slots=True)
class ClientShare:
    """The requests that one process sends, and how."""

    url: str
    headers: dict[str, str]
    requests: list[PlannedRequest]
    concurrency: int | None
    timeout_s: float


class SentRequest(NamedTuple):
    """One finished request. Times are in seconds of the machine's monotonic clock."""

    due_s: float
    sent_s: float
    done_s: float
    tokens: int  # as the server counted them
    prompts: int
    model: str
    outcome: str  # OK, or an error code


@dataclass(slots=True)
class ClientLog:
    """One process's requests, in the order they finished, and the process's own cost."""

    records: list[SentRequest] = field(default_factory=list)
    cpu_s: float = 0.0
    busy: float = 0.0  # share of one core that the process used during the run
    lags_s: list[float] = field(default_factory=list)  # delay of each tick of a clock, as answers are delayed too


def run_client(connection: Connection) -> None:
    """Send one share of the requests. Each client process calls this once.

    The process receives its `ClientShare`, sends 0 when it is ready, and receives the start time. During the run it
    sends the number of finished requests several times per second, and at the end its `ClientLog`. A further message,
    or the end of the parent process, stops the run early.
    """
    with contextlib.suppress(EOFError, ConnectionError):  # the parent process has ended
        share: ClientShare = connection.recv()
        connection.send(0)
        start_s: float = connection.recv()
        log = ClientLog()
        gc.freeze()  # otherwise each collection walks all waiting requests: 20 ms with 20,000 of them
        asyncio.run(_run(share, start_s, log, connection))
        connection.send(log)


def choose_start_time() -> float:
    """Return a time shortly from now, at which all processes can start together."""
    return time.perf_counter() + _START_DELAY_S


async def _run(share: ClientShare, start_s: float, log: ClientLog, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    await _sleep_until(start_s)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    background = [asyncio.create_task(_report_progress(log, connection)), asyncio.create_task(_measure_lags(log))]
    sending = asyncio.create_task(_send_all(share, start_s, log))

    def stop() -> None:
        loop.remove_reader(connection.fileno())
        sending.cancel()

    loop.add_reader(connection.fileno(), stop)
    await asyncio.wait([sending])
    log.cpu_s = time.process_time() - cpu_s
    log.busy = log.cpu_s / max(time.perf_counter() - wall_s, 1e-9)
    loop.remove_reader(connection.fileno())
    for task in background:
        task.cancel()
    if not sending.cancelled():
        sending.result()


async def _send_all(share: ClientShare, start_s: float, log: ClientLog) -> None:
    timeout = aiohttp.ClientTimeout(total=share.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    waiting = iter(share.requests)

    async def send(request: PlannedRequest) -> None:
        sent_s = time.perf_counter()
        try:
            async with session.post(share.url, data=request.body) as answer:
                raw = await answer.read()
        except Exception as error:  # every failure is counted, and the run continues
            outcome, tokens, done_s = type(error).__name__, 0, time.perf_counter()
        else:
            done_s = time.perf_counter()
            outcome, tokens = check_answer(answer.status, raw, request.prompts, check_values=not log.records)
        record = SentRequest(start_s + request.at_s, sent_s, done_s, tokens, request.prompts, request.model, outcome)
        log.records.append(record)

    async def send_one_after_the_other() -> None:
        for request in waiting:
            await _sleep_until(start_s + request.at_s)
            await send(request)

    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=share.headers) as session,
        asyncio.TaskGroup() as group,
    ):
        if share.concurrency:
            for _ in range(min(share.concurrency, len(share.requests))):
                group.create_task(send_one_after_the_other())
        else:
            for request in waiting:
                await _sleep_until(start_s + request.at_s)
                group.create_task(send(request))


async def _sleep_until(time_s: float) -> None:
    left_s = time_s - time.perf_counter()
    if left_s > 0:
        await asyncio.sleep(left_s)


async def _report_progress(log: ClientLog, connection: Connection) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_INTERVAL_S)
        connection.send(len(log.records))


async def _measure_lags(log: ClientLog) -> None:
    """Record how late this process handles each tick. One long delay counts for every tick that fell into it."""
    due_s = time.perf_counter() + _TICK_S
    while True:
        await _sleep_until(due_s)
        now_s = time.perf_counter()
        while due_s <= now_s:
            log.lags_s.append(now_s - due_s)
            due_s += _TICK_S
