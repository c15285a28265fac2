"""Times to the first token over HTTP, beside the engine's own time for the same request, from the gateways' log."""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

from ranklet.cluster.command.bench.answer import OK
from ranklet.cluster.command.bench.http_connection import HttpConnection
from ranklet.cluster.command.bench.requests import PlannedRequest
from ranklet.cluster.command.bench.text_answer import TextStream

_LOGGED = re.compile(r" (first-\d+-\d+) .*\bfirst_token_ms=(\S+).*\bengine_first_token_ms=(\S+)")
_LOG_WAIT_S = 30.0


class FirstToken(NamedTuple):
    """When one request's first token was seen, in milliseconds after the request was sent."""

    client_ms: float
    gateway_ms: float
    engine_ms: float


class _Client:
    """Sends requests with an id each, over kept-alive connections."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        self._idle: list[HttpConnection] = []
        self.first_ms: dict[str, float] = {}
        self.failed = 0

    async def send(self, request: PlannedRequest, id: str) -> None:
        stream = TextStream()
        connection = await self._connection()
        head = f"{self._head}x-request-id: {id}\r\ncontent-length: {len(request.body)}\r\n\r\n"
        sent_s = time.perf_counter()
        await connection.post(head.encode() + request.body, stream.feed)
        if connection.status == 200 and stream.outcome() == OK and stream.first_s is not None:
            self.first_ms[id] = (stream.first_s - sent_s) * 1e3
        else:
            self.failed += 1
        if connection.reusable:
            self._idle.append(connection)

    async def _connection(self) -> HttpConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(HttpConnection, self._host, self._port)
        return connection


def first_tokens(
    url: str, requests: Sequence[PlannedRequest], logs: Callable[[], Iterable[Path]], *, alone: bool
) -> tuple[list[FirstToken], int]:
    """Send requests and return the times of those that were answered, and the number of those that were not.

    Args:
        logs: returns the logs of the gateways, which must log all requests.
        alone: send one request at a time, instead of each at its planned time.
    """
    client, run = _Client(url), time.time_ns()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send_all(client, requests, f"first-{run}", alone=alone))
    logged = _logged(logs, set(client.first_ms))
    return [FirstToken(ms, *logged[id]) for id, ms in client.first_ms.items()], client.failed


async def _send_all(client: _Client, requests: Sequence[PlannedRequest], run: str, *, alone: bool) -> None:
    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            if alone:
                await client.send(request, f"{run}-{number}")
                continue
            await asyncio.sleep(max(0.0, start_s + request.at_s - time.perf_counter()))
            group.create_task(client.send(request, f"{run}-{number}"))


def _logged(logs: Callable[[], Iterable[Path]], ids: set[str]) -> dict[str, tuple[float, float]]:
    """Wait until the log has all ids, and return the times of the gateway and the engine by id."""
    deadline_s = time.monotonic() + _LOG_WAIT_S
    found: dict[str, tuple[float, float]] = {}
    while not ids <= found.keys():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"expected {len(ids)} requests in the gateways' log, found {len(ids & found.keys())}")
        time.sleep(0.2)
        text = "\n".join(path.read_text(errors="replace") for path in logs())
        found = {id: (float(gateway), float(engine)) for id, gateway, engine in _LOGGED.findall(text)}
    return found
