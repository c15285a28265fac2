"""Messages between an engine's process and its parent: lists of messages, pickled, over a socket.

Both ends run this package, and one is the child of the other. Nothing from outside is unpickled.
"""

import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ranklet.replicas.adapters.reference import AdapterRef, HeldAdapters


@dataclass(frozen=True)
class MethodCall:
    """Calls a method of the engine. A `Reply` with the same number follows."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Cancels the request of a call; its reply may be left out."""

    number: int


@dataclass(frozen=True)
class Prefetch:
    """Asks for an adapter to be loaded if that needs no other adapter's slot. Has no reply."""

    adapter: AdapterRef


@dataclass(frozen=True)
class Piece:
    """A piece of the output of sequence `index` of a request."""

    number: int
    index: int
    piece: Any


@dataclass(frozen=True)
class Reply:
    """The result of a call, or the RankletError it raised."""

    number: int
    result: Any


@dataclass(frozen=True)
class EngineEvent:
    """A call of the engine's listener: the method's name and its argument."""

    method: str
    record: Any


@dataclass(frozen=True)
class EngineState:
    """State of the engine, sent at each change and twice a second.

    Attributes:
        stuck_s: how long the oldest step has been on the device.
    """

    healthy: bool
    held: HeldAdapters
    stuck_s: float = 0.0


class Outbox:
    """Sends messages from a thread of its own, all waiting messages at once. `put` never waits for the other end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._send, name="ranklet-outbox", daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Queue a message. Messages are lost once the other end is gone."""
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def close(self) -> None:
        """Send the waiting messages and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _send(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                messages = list(self._waiting)
                self._waiting.clear()
            if not messages:
                return
            try:
                self._connection.send(messages)
            except OSError:  # the other end is gone; its reader notices too
                return
