"""One process of the load client: sends its share of the requests and records when and how each was answered.

Imports neither torch nor Ray. Each process measures its own CPU time and delays.
"""

import asyncio
import contextlib
import gc
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import aiohttp

from ranklet.cluster.command.bench.answer import check_answer
from ranklet.cluster.command.bench.requests import PlannedRequest
from ranklet.cluster.command.bench.text_answer import TextAnswer
from ranklet.cluster.command.bench.text_client import TextLoadClient

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
    text: bool = False  # the answers are texts, otherwise embeddings
    streamed: bool = False


class SentRequest(NamedTuple):
    """One finished request. Times are in seconds of the machine's monotonic clock."""

    due_s: float
    sent_s: float
    done_s: float
    tokens: int  # of the prompts, as the server counted them
    prompts: int
    model: str
    outcome: str  # OK, or an error code
    text: TextAnswer | None = None


@dataclass(slots=True)
class ClientLog:
    """One process's requests, in the order they finished, and the process's own cost."""

    records: list[SentRequest] = field(default_factory=list)
    cpu_s: float = 0.0
    busy: float = 0.0  # share of one core that the process used during the run
    lags_s: list[float] = field(default_factory=list)  # delay of each tick of a clock, as answers are delayed too
    gaps_s: "array[float]" = field(default_factory=lambda: array("f"))  # between arrivals, one record after the other


class AnswerEnd(NamedTuple):
    """How and when a request ended."""

    outcome: str
    done_s: float
    tokens: int
    text: TextAnswer | None = None
    gaps_s: "array[float] | None" = None


class Sender(Protocol):
    async def send(self, request: PlannedRequest) -> AnswerEnd:
        """Send a request and read its answer. Every failure is an outcome."""


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
        with asyncio.Runner(loop_factory=_loop_factory(share)) as runner:
            runner.run(_run(share, start_s, log, connection))
        connection.send(log)


def _loop_factory(share: ClientShare) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop for text, where it halves the CPU of a token. None is the default loop."""
    if not share.text or sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def choose_start_time() -> float:
    """Return a time shortly from now, at which all processes can start together."""
    return time.perf_counter() + _START_DELAY_S


async def _run(share: ClientShare, start_s: float, log: ClientLog, connection: Connection) -> None:
    await _sleep_until(start_s)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    sending = asyncio.create_task(_send_all(share, start_s, log))
    talk = _talk_to_parent(log, connection, sending.cancel)
    background = [asyncio.create_task(talk), asyncio.create_task(_measure_lags(log))]
    await asyncio.wait([sending])
    log.cpu_s = time.process_time() - cpu_s
    log.busy = log.cpu_s / max(time.perf_counter() - wall_s, 1e-9)
    for task in background:
        task.cancel()
    if not sending.cancelled():
        sending.result()


class EmbeddingsSender:
    """Sends requests for embeddings with aiohttp."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._answered = 0

    async def send(self, request: PlannedRequest) -> AnswerEnd:
        try:
            async with self._session.post(self._url, data=request.body) as answer:
                raw = await answer.read()
        except Exception as error:  # every failure is counted, and the run continues
            self._answered += 1
            return AnswerEnd(type(error).__name__, time.perf_counter(), 0)
        done_s = time.perf_counter()
        outcome, tokens = check_answer(answer.status, raw, request.prompts, check_values=not self._answered)
        self._answered += 1
        return AnswerEnd(outcome, done_s, tokens)


class TextSender:
    """Sends requests for text."""

    def __init__(self, client: TextLoadClient) -> None:
        self._client = client

    async def send(self, request: PlannedRequest) -> AnswerEnd:
        reply = await self._client.send(request.body)
        tokens = reply.answer.prompt_tokens if reply.answer else 0
        return AnswerEnd(reply.outcome, reply.done_s, tokens, reply.answer, reply.gaps_s)


@contextlib.asynccontextmanager
async def _open_sender(share: ClientShare) -> AsyncIterator[Sender]:
    if share.text:
        client = TextLoadClient(share.url, share.headers, share.timeout_s, streamed=share.streamed)
        with contextlib.closing(client):
            yield TextSender(client)
        return
    timeout = aiohttp.ClientTimeout(total=share.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=share.headers) as session:
        yield EmbeddingsSender(session, share.url)


async def _send_all(share: ClientShare, start_s: float, log: ClientLog) -> None:
    waiting = iter(share.requests)

    async def send(request: PlannedRequest) -> None:
        sent_s = time.perf_counter()
        end = await sender.send(request)
        log.records.append(
            SentRequest(
                start_s + request.at_s, sent_s, end.done_s, end.tokens, request.prompts, request.model, end.outcome,
                end.text,
            )
        )  # fmt: skip
        if end.gaps_s:
            log.gaps_s.extend(end.gaps_s)

    async def send_one_after_the_other() -> None:
        for request in waiting:
            await _sleep_until(start_s + request.at_s)
            await send(request)

    async with _open_sender(share) as sender, asyncio.TaskGroup() as group:
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


async def _talk_to_parent(log: ClientLog, connection: Connection, stop: Callable[[], object]) -> None:
    """Report progress until the parent process sends a message or ends. A reader would make the pipe non-blocking."""
    try:
        while not connection.poll():
            connection.send(len(log.records))
            await asyncio.sleep(_PROGRESS_INTERVAL_S)
    except ConnectionError:
        pass
    stop()


async def _measure_lags(log: ClientLog) -> None:
    """Record how late this process handles each tick. One long delay counts for every tick that fell into it."""
    due_s = time.perf_counter() + _TICK_S
    while True:
        await _sleep_until(due_s)
        now_s = time.perf_counter()
        while due_s <= now_s:
            log.lags_s.append(now_s - due_s)
            due_s += _TICK_S
