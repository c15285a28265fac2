"""Events of a streamed answer that wait for its client."""

import asyncio
from collections.abc import Callable

from ranklet.cluster.ingress.refusals import body_of
from ranklet.cluster.text.frames import DONE, error_frame
from ranklet.replicas.errors import RankletError


class ReaderTooSlow(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """The client reads its stream more slowly than the text is generated, and too much of it waits."""

    code, status = "reader_too_slow", 408


class FrameQueue:
    """Frames that wait for one client, up to `limit_bytes`.

    Frames that are added at once while the writer waits for them may take more: it takes them all as soon as it runs.

    Attributes:
        error: why the stream ended early.
        has_begun: whether there was a frame.
        on_overflow: called once if more would wait.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.error: RankletError | None = None
        self.has_begun = False
        self.on_overflow: Callable[[], object] = lambda: None
        self._limit_bytes = limit_bytes
        self._frames: list[bytes] = []
        self._bytes = 0
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None  # an Event costs a tenth of a frame's CPU time

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def put(self, frame: bytes) -> None:
        """Add a frame. After the end, it is dropped."""
        if self._is_closed:
            return
        if self._bytes + len(frame) > self._limit_bytes and self._frames and self._waiter is None:
            self._frames.clear()
            self.fail(
                ReaderTooSlow(
                    f"expected a client that reads as fast as the text is generated, got one for which "
                    f"{self._bytes} bytes wait (limits.max_waiting_stream_bytes: {self._limit_bytes}). Read the stream "
                    "at once, or send a request without stream"
                )
            )
            self.on_overflow()
            return
        self.has_begun = True
        self._frames.append(frame)
        self._bytes += len(frame)
        self._wake()

    def close(self, *last: bytes) -> None:
        """Add the last frames."""
        if not self._is_closed:
            self._frames.extend(last)
            self._is_closed = True
            self._wake()

    def fail(self, error: RankletError) -> None:
        """End the stream with an error. If nothing was added before, there is no frame of it."""
        if self._is_closed:
            return
        self.error = error
        if self.has_begun:
            self.close(error_frame(body_of(error)["error"]), DONE)
        else:
            self.close()

    async def opened(self) -> None:
        """Wait for the first frame, or for the end."""
        if not self._frames and not self._is_closed:
            await self._change()

    async def take(self) -> bytes:
        """Wait for frames. Returns all that wait; b"" at the end."""
        if not self._frames and not self._is_closed:
            await self._change()
        waiting = b"".join(self._frames)
        self._frames.clear()
        self._bytes = 0
        return waiting

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
