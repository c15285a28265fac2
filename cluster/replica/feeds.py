"""Carries pieces of texts from a replica to the gateways: one stream a gateway, whose messages are not read here."""

import asyncio
import contextlib
import pickle
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from ranklet.cluster.message import MAX_MESSAGE_BYTES, Begun
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.errors import Unavailable

MAX_WAITING_BYTES = 8 << 20  # of one gateway: a second of a full engine with many logprobs, ten without


class GatewayLost(Unavailable):
    """The process of the gateway that sent the call has ended, so nobody waits for the text."""


class _Reader:
    """The open stream of a gateway. `wake` and `end` may be called on any thread."""

    def __init__(self) -> None:
        self.is_ended = False
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self.changed.set)

    def end(self) -> None:
        self.is_ended = True
        self.wake()


@dataclass(slots=True)
class _Outgoing:
    """What waits for one gateway.

    Attributes:
        calls: a timeout for each open text call, which ends it.
        reader: None while the gateway has no stream open.
    """

    waiting: deque[bytes] = field(default_factory=deque)
    waiting_bytes: int = 0
    calls: set[asyncio.Timeout] = field(default_factory=set)
    reader: _Reader | None = None


class OutgoingFeeds(Listener):
    """The feeds of one replica. Thread-safe.

    Pieces wait while their gateway opens its stream, for example again after a lost connection. If more than
    `max_waiting_bytes` wait, they are dropped and the stream ends. Answers contain all tokens, so that gateways lose
    nothing but time.
    """

    def __init__(self, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._gateways: dict[str, _Outgoing] = {}
        self._lock = threading.Lock()
        self.dropped_bytes = 0

    @property
    def callers(self) -> frozenset[str]:
        """Gateways with open text calls."""
        with self._lock:
            return frozenset(gateway for gateway, outgoing in self._gateways.items() if outgoing.calls)

    @contextlib.asynccontextmanager
    async def call_from(self, gateway: str) -> AsyncIterator[None]:
        """Keep what the gateway cannot receive yet while a text call of it, which is the body, is open.

        Raises:
            GatewayLost: the body was cancelled by `lose`.
        """
        life = asyncio.timeout(None)
        with self._lock:
            outgoing = self._gateways.setdefault(gateway, _Outgoing())
            outgoing.calls.add(life)
        try:
            async with life:
                yield
        except TimeoutError as error:
            if not life.expired():
                raise
            raise GatewayLost(f"gateway {gateway}, which had sent the request, has ended") from error
        finally:
            with self._lock:
                outgoing.calls.discard(life)
                self._remove_if_unused(gateway, outgoing)

    def lose(self, gateway: str) -> None:
        """End the open calls and the stream of a gateway that has ended. Call it in their event loop."""
        with self._lock:
            outgoing = self._gateways.get(gateway)
            calls = () if outgoing is None else tuple(outgoing.calls)
            reader = None if outgoing is None else outgoing.reader
        for life in calls:
            if not life.expired():
                life.reschedule(0.0)
        if reader is not None:
            reader.end()

    def begin(self, gateway: str, begun: Begun) -> None:
        self.pieces(gateway, pickle.dumps(begun))

    def pieces(self, gateway: str, data: bytes) -> None:
        """Send a message. Drop it if the gateway has neither an open text call nor a stream."""
        with self._lock:
            outgoing = self._gateways.get(gateway)
            if outgoing is None:
                return
            reader, was_empty = outgoing.reader, not outgoing.waiting
            outgoing.waiting.append(data)
            outgoing.waiting_bytes += len(data)
            is_full = outgoing.waiting_bytes > self._max_waiting_bytes
            if is_full:
                self.dropped_bytes += outgoing.waiting_bytes
                outgoing.waiting.clear()
                outgoing.waiting_bytes = 0
        if reader is not None and is_full:
            reader.end()
        elif reader is not None and was_empty:
            reader.wake()

    async def read(self, gateway: str) -> AsyncGenerator[list[bytes], None]:
        """Yield the messages for a gateway, all that wait at once. The first list is empty: the stream is open.

        Ends when the gateway opens another stream, or reads too slowly.
        """
        reader = _Reader()
        with self._lock:
            outgoing = self._gateways.setdefault(gateway, _Outgoing())
            before, outgoing.reader = outgoing.reader, reader
        if before is not None:
            before.end()
        try:
            yield []
            while not reader.is_ended:
                messages = self._take(outgoing, reader)
                if messages:
                    yield messages
                else:
                    await reader.changed.wait()
        finally:
            with self._lock:
                if outgoing.reader is reader:
                    outgoing.reader = None
                    self._remove_if_unused(gateway, outgoing)

    def _take(self, outgoing: _Outgoing, reader: _Reader) -> list[bytes]:
        """Return what waits, up to the size of a message."""
        with self._lock:
            reader.changed.clear()
            messages: list[bytes] = []
            size = 0
            while outgoing.reader is reader and outgoing.waiting and size < MAX_MESSAGE_BYTES:
                messages.append(outgoing.waiting.popleft())
                size += len(messages[-1])
            outgoing.waiting_bytes -= size
            return messages

    def _remove_if_unused(self, gateway: str, outgoing: _Outgoing) -> None:
        if not outgoing.calls and outgoing.reader is None and self._gateways.get(gateway) is outgoing:
            del self._gateways[gateway]
