"""One process of the load client: sends its share of the requests and notes when each was answered, and how.

Imports neither torch nor Ray; what it does besides sending is kept small, and what it costs is measured.
"""

import asyncio
import base64
import contextlib
import math
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import aiohttp
import orjson

from ranklet.cluster.bench.requests import Asked

OK = "ok"
_START_IN_S = 0.05
_TOLD_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sends."""

    url: str
    headers: dict[str, str]
    asked: list[Asked]
    concurrency: int | None
    timeout_s: float
    open_loop: bool  # latency counts from when a request was due, whether or not the client was late


class Record(NamedTuple):
    """What came of one request. Times in seconds of the machine's monotonic clock."""

    due_s: float
    sent_s: float
    done_s: float
    tokens: int  # as the server counted them
    prompts: int
    label: int
    outcome: str  # OK, or the code of what went wrong


@dataclass(slots=True)
class Log:
    """A process's records, as its requests were answered."""

    records: list[Record] = field(default_factory=list)
    busy: float = 0.0  # the share of a core that the process used while it ran


def serve(connection: Connection) -> None:
    """Entry point of a process: takes its share, says that it is ready, is told the starting time.

    While it runs it tells how many requests were answered, several times a second; in the end it hands over its log.
    """
    share: Share = connection.recv()
    connection.send(0)
    begin_s: float = connection.recv()
    log = Log()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(share, begin_s, log, connection))
    connection.send(log)


def starting_time() -> float:
    """When processes that are ready should begin."""
    return time.perf_counter() + _START_IN_S


async def _run(share: Share, begin_s: float, log: Log, connection: Connection) -> None:
    limit = asyncio.Semaphore(share.concurrency or len(share.asked))
    timeout = aiohttp.ClientTimeout(total=share.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=share.headers) as session:

        async def send(asked: Asked) -> None:
            due_s = begin_s + asked.at_s
            if due_s > time.perf_counter():
                await asyncio.sleep(due_s - time.perf_counter())
            async with limit:
                sent_s = time.perf_counter()
                outcome, tokens = await _ask(session, share.url, asked)
                done_s = time.perf_counter()
            log.records.append(Record(due_s, sent_s, done_s, tokens, asked.prompts, asked.label, outcome))

        await asyncio.sleep(max(0.0, begin_s - time.perf_counter()))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        telling = asyncio.create_task(_tell(log, connection))
        try:
            await asyncio.gather(*(send(asked) for asked in share.asked))
        finally:
            telling.cancel()
            log.busy = (time.process_time() - cpu_s) / max(time.perf_counter() - wall_s, 1e-9)


async def _tell(log: Log, connection: Connection) -> None:
    while True:
        await asyncio.sleep(_TOLD_EVERY_S)
        connection.send(len(log.records))


async def _ask(session: aiohttp.ClientSession, url: str, asked: Asked) -> tuple[str, int]:
    """`ok` and the answer's tokens, or the code of what went wrong."""
    try:
        async with session.post(url, data=asked.body) as answer:
            raw = await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return type(error).__name__, 0
    try:
        said = orjson.loads(raw)
        if answer.status != 200:
            told = said.get("error") or said
            return str(told.get("code") or told.get("type") or answer.status), 0
        return (OK, int(said["usage"]["prompt_tokens"])) if len(said["data"]) == asked.prompts else ("bad_answer", 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{answer.status}" if answer.status != 200 else "bad_answer", 0


async def first_answer(url: str, headers: dict[str, str], asked: list[Asked], timeout_s: float) -> None:
    """Send these one after the other; the first answer is looked at closely.

    Raises:
        ValueError: the server cannot be reached, refuses, or answers with something else than vectors.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s), headers=headers) as session:
        for number, one in enumerate(asked):
            try:
                async with session.post(url, data=one.body) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ValueError(f"expected a server at {url}, got {type(error).__name__}: {error}") from None
            if answer.status != 200:
                said = raw[:500].decode(errors="replace")
                raise ValueError(f"expected vectors of the first request, got {answer.status}: {said}")
            if number == 0:
                _check(orjson.loads(raw), one.prompts)


def _check(said: Any, prompts: int) -> None:
    vectors = [entry["embedding"] for entry in said["data"]]
    if len(vectors) != prompts:
        raise ValueError(f"expected {prompts} vectors of the first request, got {len(vectors)}")
    for vector in vectors:
        if isinstance(vector, str):
            vector = memoryview(base64.b64decode(vector)).cast("f")
        if not len(vector) or not all(map(math.isfinite, vector)):
            raise ValueError("expected vectors of finite numbers, got an empty one or one that is not finite")
