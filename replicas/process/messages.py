"""Messages between an engine's process and its parent process: pickled lists of messages over a socket.

The socket connects only these two processes, which run the same package. No data from outside is unpickled.
"""

import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ranklet.replicas.adapters.reference import AdapterRef, HeldAdapters
from ranklet.replicas.engine.generate import TokenPiece
from ranklet.replicas.model.sampled import TokenLogprob

# Number of the call, index of the sequence, tokens, and for each token its logprob and the best alternatives. A step of
# 256 texts has 256 pieces. Pickling them takes 0.03 ms as plain tuples and 0.36 ms as objects. Pickling holds the GIL.
PieceTuple = tuple[int, int, tuple[int, ...], tuple[tuple[Any, ...], ...] | None]


@dataclass(frozen=True)
class MethodCall:
    """Calls a method of the engine. A `Reply` with the same number answers it."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Cancels the request of a call, which may then get no reply."""

    number: int


@dataclass(frozen=True)
class Prefetch:
    """Calls `Engine.prefetch`. Has no reply."""

    adapter: AdapterRef


@dataclass(frozen=True)
class Reply:
    """The result of a call, or the RankletError it raised."""

    number: int
    result: Any


@dataclass(frozen=True)
class EngineEvent:
    """Calls a method of the engine's listener with one argument."""

    method: str
    record: Any


@dataclass(frozen=True)
class EngineState:
    """State of the engine, sent at each change and twice a second.

    Attributes:
        problem: why the engine is unhealthy; None if it is healthy.
        stuck_s: how long the oldest step has been on the device.
    """

    problem: str | None
    held: HeldAdapters
    stuck_s: float = 0.0


def pack_piece(number: int, index: int, piece: TokenPiece) -> PieceTuple:
    """Return a message with a piece of the output of sequence `index` of the request of a call."""
    tokens, logprobs = piece
    return number, index, tokens, None if logprobs is None else tuple(map(tuple, logprobs))


def unpack_piece(message: PieceTuple) -> TokenPiece:
    _, _, tokens, logprobs = message
    return tokens, None if logprobs is None else tuple(TokenLogprob(*each) for each in logprobs)


class Outbox:
    """Sends messages in a thread of its own, so that `put` never blocks. Sends all waiting messages at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._send, name="ranklet-outbox", daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Queue a message. It is lost if the other process is gone."""
        with self._changed:
            self._waiting.append(message)
            self._changed.notify()

    def put_later(self, message: object) -> None:
        """Queue a message that needs no sending before the next `put`, so that many messages are sent at once."""
        self._waiting.append(message)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _send(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                # `put_later` appends without the lock, perhaps at this moment.
                messages = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if not messages:
                return
            try:
                self._connection.send(messages)
            except OSError:  # the other process is gone; the thread that receives its messages ends too
                return
