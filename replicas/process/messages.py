"""Messages between an engine's process and its parent process: pickled lists of messages over a socket.

The socket connects only these two processes, which run the same package. No data from outside is unpickled.
"""

import pickle
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ranklet.replicas.adapters.reference import AdapterRef, HeldAdapters
from ranklet.replicas.engine.generate import TokenPiece
from ranklet.replicas.model.sampled import TokenLogprob

# Number of the request, index of the text, number of the text's tokens before these, tokens, and for each token its
# logprob and the best alternatives. A step of 256 texts has 256 pieces. Pickling them takes 0.03 ms as plain tuples and
# 0.36 ms as objects. Pickling holds the GIL.
PieceTuple = tuple[int, int, int, tuple[int, ...], tuple[tuple[Any, ...], ...] | None]


class FeedKey(NamedTuple):
    """The receiver of a request's pieces.

    Attributes:
        gateway: id of the gateway; "" for a sink in the parent process.
        number: the receiver's number of the request, which its pieces carry.
    """

    gateway: str
    number: int


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
class Finish:
    """Calls `Ticket.finish` of the request of a call. Has no reply."""

    number: int
    index: int


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
class TextBegun:
    """Calls `Sink.begun` of a call's sink."""

    number: int
    index: int
    cached_tokens: int


@dataclass(frozen=True)
class FeedPieces:
    """Pieces of texts for one gateway, packed by `pack_pieces`. The parent process passes them on unread."""

    gateway: str
    data: bytes


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


def piece_tuple(number: int, index: int, start: int, piece: TokenPiece) -> PieceTuple:
    tokens, logprobs = piece
    return number, index, start, tokens, None if logprobs is None else tuple(map(tuple, logprobs))


def token_piece(message: PieceTuple) -> TokenPiece:
    _, _, _, tokens, logprobs = message
    return tokens, None if logprobs is None else tuple(TokenLogprob(*each) for each in logprobs)


def pack_pieces(pieces: list[PieceTuple]) -> bytes:
    return pickle.dumps(pieces, pickle.HIGHEST_PROTOCOL)


def unpack_pieces(data: bytes) -> list[PieceTuple]:
    """Return the pieces in the order in which they were made. The data must come from a process of this cluster."""
    pieces: list[PieceTuple] = pickle.loads(data)
    return pieces


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


class StepPieces:
    """Collects the pieces of a step, and sends those of each gateway as one message.

    Each message costs the parent process some Python time. A message per piece would cost more than the engine's step.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._pieces: deque[tuple[str, PieceTuple]] = deque()
        self._lock = threading.Lock()  # of `flush`: a failed load ends requests on a thread of its own

    def add(self, gateway: str, piece: PieceTuple) -> None:
        self._pieces.append((gateway, piece))

    def flush(self) -> None:
        """Queue the collected pieces for the next `Outbox.put`."""
        if not self._pieces:
            return
        with self._lock:
            by_gateway: dict[str, list[PieceTuple]] = {}
            for _ in range(len(self._pieces)):
                gateway, piece = self._pieces.popleft()
                by_gateway.setdefault(gateway, []).append(piece)
            for gateway, pieces in by_gateway.items():
                self._outbox.put_later(FeedPieces(gateway, pack_pieces(pieces)))
