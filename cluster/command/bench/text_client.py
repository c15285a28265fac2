"""Sends requests for text over kept-alive connections, and reads each answer as it arrives."""

import asyncio
import ssl
import time
from array import array
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ranklet.cluster.command.bench.answer import check_status
from ranklet.cluster.command.bench.http_connection import HttpConnection
from ranklet.cluster.command.bench.text_answer import NO_DONE, TextAnswer, TextStream, read_whole

_DISCONNECTED = "disconnected"  # the connection was lost before the end of the answer


@dataclass(slots=True)
class TextReply:
    """The end of one request. `answer` is None if the server sent no text API's answer with status 200."""

    outcome: str  # OK, or an error code
    done_s: float
    answer: TextAnswer | None = None
    gaps_s: "array[float]" = field(default_factory=lambda: array("f"))
    detail: bytes = b""  # body of a refusal


class TextLoadClient:
    """One process's connections. Opens one if all others wait for an answer."""

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float, *, streamed: bool) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._head = f"POST {path} HTTP/1.1\r\n{head}content-length: ".encode()
        self._timeout_s = timeout_s
        self._streamed = streamed
        self._idle: list[HttpConnection] = []

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def send(self, body: bytes) -> TextReply:
        """Send a request and read its answer. Every failure is an outcome."""
        stream, raw = TextStream(), list[bytes]()
        connection: HttpConnection | None = None

        def receive(part: bytes, now_s: float) -> None:
            if self._streamed and connection is not None and connection.status == 200:
                stream.feed(part, now_s)
            else:
                raw.append(part)

        failure: str | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                await connection.post(b"%b%d\r\n\r\n%b" % (self._head, len(body), body), receive)
        except ConnectionResetError:
            failure = _DISCONNECTED
        except Exception as error:  # every failure is counted, and the run continues
            failure = type(error).__name__
        finally:
            if connection is not None:
                self._give_back(connection)
        status = connection.status if connection is not None else 0
        return self._reply(status, failure, stream, b"".join(raw))

    async def _connection(self) -> HttpConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(HttpConnection, self._host, self._port, ssl=self._tls)
        return connection

    def _give_back(self, connection: HttpConnection) -> None:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def _reply(self, status: int, failure: str | None, stream: TextStream, raw: bytes) -> TextReply:
        now_s = time.perf_counter()
        if self._streamed and status == 200:
            if not failure:
                stream.end(now_s)
            outcome = stream.outcome()
            if outcome == NO_DONE and failure:
                outcome = failure
            return TextReply(outcome, stream.done_s or now_s, stream.summary(), stream.gaps_s)
        if failure or status != 200:
            return TextReply(failure or check_status(status, raw), now_s, detail=raw)
        outcome, answer = read_whole(raw)
        return TextReply(outcome, now_s, answer, detail=raw)
