"""What travels between an engine's process and the one that asks it: lists of messages, pickled, over a socket.

Both ends are this package, one the child of the other; nothing from outside is ever unpickled.
"""

import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ranklet.replicas.adapters.reference import AdapterRef, HeldAdapters


@dataclass(frozen=True)
class MethodCall:
    """Asks for a method of the engine; a `Reply` of the same number follows."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a reply any more."""

    number: int


@dataclass(frozen=True)
class Prefetch:
    """An adapter that may be wanted soon."""

    adapter: AdapterRef


@dataclass(frozen=True)
class Reply:
    """A result, or the exception that came instead."""

    number: int
    result: Any


@dataclass(frozen=True)
class EngineEvent:
    """A record for the engine's listener: the name of its method, and what it is given."""

    method: str
    record: Any


@dataclass(frozen=True)
class EngineState:
    """How the engine is, said at every change and a few times a second."""

    healthy: bool
    held: HeldAdapters
    stuck_s: float = 0.0  # how long the batch on the device has been there


class Outbox:
    """Sends from a thread of its own, all that waits in one go: who puts something in never waits for the other end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._send, name="ranklet-outbox", daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Send it soon; what is put in after the other end has gone is lost."""
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def close(self) -> None:
        """Send what waits, then stop."""
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
            except OSError:  # the other end has gone, which its reader sees too
                return
