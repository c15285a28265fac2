"""One process of the load client: sends its share of the requests and notes when each was answered, and how.

Imports neither torch nor Ray; what it does besides sending is kept small, and what it costs is measured.
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

_START_IN_S = 0.05
_TOLD_EVERY_S = 0.2
_TICK_S = 0.01


@dataclass(frozen=True, slots=True)
class ClientShare:
    """What one process sends."""

    url: str
    headers: dict[str, str]
    asked: list[PlannedRequest]
    concurrency: int | None
    timeout_s: float


class SentRequest(NamedTuple):
    """What came of one request. Times in seconds of the machine's monotonic clock."""

    due_s: float
    sent_s: float
    done_s: float
    tokens: int  # as the server counted them
    prompts: int
    model: str
    outcome: str  # OK, or the code of what went wrong


@dataclass(slots=True)
class ClientLog:
    """A process's records, as its requests were answered, and what the process itself cost."""

    records: list[SentRequest] = field(default_factory=list)
    cpu_s: float = 0.0
    busy: float = 0.0  # the share of a core that the process used while it ran
    lags_s: list[float] = field(default_factory=list)  # how late it came to each tick of a clock, as to any answer


def serve(connection: Connection) -> None:
    """Entry point of a process: takes its share, says that it is ready, is told the starting time.

    While it runs it tells how many requests were answered, several times a second; in the end it hands over its log.
    Any further message, or the death of whoever started it, ends it early.
    """
    with contextlib.suppress(EOFError, ConnectionError):  # nobody is left to hear of it
        share: ClientShare = connection.recv()
        connection.send(0)
        begin_s: float = connection.recv()
        log = ClientLog()
        gc.freeze()  # else collections walk all the requests that wait: 20 ms each with 20,000 of them
        asyncio.run(_run(share, begin_s, log, connection))
        connection.send(log)


def starting_time() -> float:
    """When processes that are ready should begin."""
    return time.perf_counter() + _START_IN_S


async def _run(share: ClientShare, begin_s: float, log: ClientLog, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    await _until(begin_s)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    beside = [asyncio.create_task(_tell(log, connection)), asyncio.create_task(_tick(log))]
    sending = asyncio.create_task(_send(share, begin_s, log))

    def stop() -> None:
        loop.remove_reader(connection.fileno())
        sending.cancel()

    loop.add_reader(connection.fileno(), stop)
    await asyncio.wait([sending])
    log.cpu_s = time.process_time() - cpu_s
    log.busy = log.cpu_s / max(time.perf_counter() - wall_s, 1e-9)
    loop.remove_reader(connection.fileno())
    for task in beside:
        task.cancel()
    if not sending.cancelled():
        sending.result()


async def _send(share: ClientShare, begin_s: float, log: ClientLog) -> None:
    timeout = aiohttp.ClientTimeout(total=share.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    waiting = iter(share.asked)

    async def one(asked: PlannedRequest) -> None:
        sent_s = time.perf_counter()
        try:
            async with session.post(share.url, data=asked.body) as answer:
                raw = await answer.read()
        except Exception as error:  # whatever it is, it is counted, and the others go on
            outcome, tokens, done_s = type(error).__name__, 0, time.perf_counter()
        else:
            done_s = time.perf_counter()
            outcome, tokens = check_answer(answer.status, raw, asked.prompts, check_values=not log.records)
        record = SentRequest(begin_s + asked.at_s, sent_s, done_s, tokens, asked.prompts, asked.model, outcome)
        log.records.append(record)

    async def lane() -> None:
        for asked in waiting:
            await _until(begin_s + asked.at_s)
            await one(asked)

    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=share.headers) as session,
        asyncio.TaskGroup() as group,
    ):
        if share.concurrency:
            for _ in range(min(share.concurrency, len(share.asked))):
                group.create_task(lane())
        else:
            for asked in waiting:
                await _until(begin_s + asked.at_s)
                group.create_task(one(asked))


async def _until(time_s: float) -> None:
    left_s = time_s - time.perf_counter()
    if left_s > 0:
        await asyncio.sleep(left_s)


async def _tell(log: ClientLog, connection: Connection) -> None:
    while True:
        await asyncio.sleep(_TOLD_EVERY_S)
        connection.send(len(log.records))


async def _tick(log: ClientLog) -> None:
    """An answer waits for this process as long as a tick does; a long wait counts as all the ticks it swallowed."""
    due_s = time.perf_counter() + _TICK_S
    while True:
        await _until(due_s)
        now_s = time.perf_counter()
        while due_s <= now_s:
            log.lags_s.append(now_s - due_s)
            due_s += _TICK_S
