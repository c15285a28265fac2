"""A streamed answer: server-sent events that are written while the text is generated."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ranklet.cluster.ingress.frame_queue import FrameQueue, ReaderTooSlow
from ranklet.cluster.ingress.generation import TextGeneration
from ranklet.cluster.ingress.refusals import unexpected
from ranklet.cluster.ingress.text_format import TextFormat
from ranklet.cluster.text.choice import ChoiceText, TextPiece
from ranklet.cluster.text.frames import StreamFrames
from ranklet.replicas.errors import RankletError

logger = logging.getLogger("ray.serve")


class StreamedTexts:
    """Writes the frames of a request's texts; implements `ranklet.cluster.ingress.generation.PieceSink`.

    Attributes:
        generation: of the texts, set before the first of them.
    """

    generation: TextGeneration

    def __init__(self, queue: FrameQueue, frames: StreamFrames, format: TextFormat, *, usage_always: bool) -> None:
        self._queue = queue
        self._frames = frames
        self._format = format
        self._usage_always = usage_always
        self._opened: set[int] = set()

    def add(self, index: int, piece: TextPiece) -> None:
        is_first = self._open(index)
        if piece.text or piece.tokens:
            self._put(self._format.chunk(index, piece, None, is_first=is_first))

    def end(self, index: int, piece: TextPiece, choice: ChoiceText) -> None:
        is_first = self._open(index)
        self._put(self._format.chunk(index, piece, choice, is_first=is_first))

    def _open(self, index: int) -> bool:
        """Write what precedes the text of a choice. Returns whether the next chunk is the choice's first."""
        if index in self._opened:
            return False
        opening, extras = self._format.opening(index)
        if opening is None:  # the choice begins with its first text
            return True
        self._put(opening, extras)
        return False

    def _put(self, choice: Mapping[str, Any] | None, extras: Mapping[str, Any] | None = None) -> None:
        if choice is None:
            return
        usage = self.generation.usage() if self._usage_always else None
        self._opened.add(choice["index"])
        self._queue.put(self._frames.chunk(choice, usage, extras))


class WriteLimit:
    """Bounds the time of each write of a stream. One timer serves all of them: a timeout of each would cost more.

    Raises:
        TimeoutError: on leaving the context, if a write took longer than `limit_s`.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._began_s: float | None = None  # the write that is under way
        self._timer = self._loop.call_later(limit_s, self._check)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def begin(self) -> None:
        self._began_s = self._loop.time()

    def end(self) -> None:
        self._began_s = None

    def _check(self) -> None:
        now_s = self._loop.time()
        left_s = self._limit_s if self._began_s is None else self._began_s + self._limit_s - now_s
        if left_s <= 0:
            self._timeout.reschedule(now_s)
        else:
            self._timer = self._loop.call_later(left_s, self._check)


class EventStream(Response):
    """The answer to a streamed request. Cancels the generation if the client leaves.

    Args:
        queue: has begun.
        write_timeout_s: how long one write may take.
    """

    media_type = "text/event-stream"

    def __init__(
        self, queue: FrameQueue, generating: "asyncio.Task[None]", headers: Mapping[str, str], write_timeout_s: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self.queue = queue
        self._generating = generating
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(send)
        finally:
            self._generating.cancel()

    async def _send(self, send: Send) -> None:
        timeout_s = self._write_timeout_s
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with WriteLimit(timeout_s) as limit:
                is_last = False
                while not is_last:
                    waiting = await self.queue.take()
                    is_last = self.queue.is_closed
                    limit.begin()
                    await send({"type": "http.response.body", "body": waiting, "more_body": not is_last})
                    limit.end()
        except TimeoutError:  # the connection is closed, since the answer has no end
            self.queue.error = ReaderTooSlow(f"expected a client that reads the stream, got none for {timeout_s:g} s")


async def open_stream(queue: FrameQueue, run: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
    """Start to generate, and wait for the first frame. The generation is cancelled if the queue overflows.

    Args:
        run: generates, and adds frames to `queue`. An error that it raises ends the queue.

    Raises:
        RankletError: an error before the first frame.
    """

    async def generate() -> None:
        try:
            await run()
        except RankletError as error:
            queue.fail(error)
        except Exception as error:
            queue.fail(unexpected("a stream failed", error))

    task = asyncio.create_task(generate())
    queue.on_overflow = task.cancel
    try:
        await queue.opened()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not queue.has_begun and queue.error is not None:
        with contextlib.suppress(asyncio.CancelledError):
            await task
        raise queue.error
    return task
