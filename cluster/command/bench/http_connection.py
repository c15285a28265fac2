"""An HTTP/1.1 connection that passes on each read of an answer as it arrives.

For a stream with one token a read, aiohttp costs twice the CPU of this and uvloop.
"""

import asyncio
import time
from collections.abc import Callable
from typing import cast

from httptools import HttpParserError, HttpResponseParser

Receiver = Callable[[bytes, float], None]  # called with a part of the body and the time it arrived


class HttpConnection(asyncio.Protocol):
    """Sends one request after the other. Methods that begin with on_ are called by the parser."""

    def __init__(self) -> None:
        self.status = 0  # of the latest answer
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._answer: asyncio.Future[None] | None = None
        self._receive: Receiver | None = None
        self._parts: list[bytes] = []
        self._body_began = False
        self._has_length = False
        self._complete = False
        self._keep_alive = False

    @property
    def reusable(self) -> bool:
        """Whether the connection is open and may carry another request."""
        return self._complete and self._transport is not None and not self._transport.is_closing()

    async def post(self, request: bytes, receive: Receiver) -> None:
        """Send a request, and return at the end of the answer.

        Raises:
            OSError: The connection was lost before the end of the answer, or the answer is not HTTP.
        """
        if self._transport is None:
            raise ConnectionResetError("the server closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._receive = receive
        self._parts.clear()
        self.status, self._body_began, self._has_length, self._complete = 0, False, False, False
        self._transport.write(request)
        await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        until_closed = self._body_began and not self._has_length
        self._end(None if until_closed and not error else ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        failure = None
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            failure = ConnectionError(f"expected an answer in HTTP, got {error}")
        if self._parts and self._receive:
            self._receive(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts), now_s)
            self._parts.clear()
        if failure or self._complete:
            if failure or not self._keep_alive:
                self.close()
            self._end(failure)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._body_began = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._complete = self.status >= 200  # a status below announces the answer's own
        self._keep_alive = self._parser.should_keep_alive()  # later the parser has forgotten it

    def _end(self, error: OSError | None) -> None:
        answer, self._answer, self._receive = self._answer, None, None
        if answer and not answer.done():
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(None)
