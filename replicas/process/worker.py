"""The program of an engine's process: `python -m ranklet.replicas.process.worker FD`.

FD is the file descriptor of a socket to the parent process. No HTTP or RPC server in this interpreter competes with the
thread that launches steps.
"""

import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef, LoadRecord
from ranklet.replicas.cache.pages import IntegrityError
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.api import QUICK_CALLS
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.garbage import freeze_garbage_collector
from ranklet.replicas.engine.generate import TokenPiece
from ranklet.replicas.engine.params import Params
from ranklet.replicas.engine.request import Answer, Ticket
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.escape import EscapingFormatter
from ranklet.replicas.process.messages import (
    Cancel,
    EngineEvent,
    EngineState,
    FeedKey,
    Finish,
    MethodCall,
    Outbox,
    Prefetch,
    Reply,
    StepPieces,
    TextBegun,
    piece_tuple,
)

_STATE_INTERVAL_S = 0.5
_STATES_PER_CHECK = 10  # a check of 16,000 pages takes 5 ms of this thread, 0.4 ms of it with the engine's lock
SWITCH_INTERVAL_S = 0.0005  # time after which a thread yields the interpreter to a waiting one; 5 ms by default
_LOAD_THREADS = 4  # concurrent calls of `load`, which wait for the engine's loader threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ReplySink:
    """Sends the answer of a request to the parent process, and its pieces to a feed if it has one.

    Attributes:
        sent: number of tokens that the receiver of the feed has, by index of the text.
    """

    number: int
    outbox: Outbox
    finished: Callable[[int], None]
    pieces: StepPieces
    feed: FeedKey | None
    sent: dict[int, int]

    def begun(self, index: int, cached_tokens: int) -> None:
        self.outbox.put_later(TextBegun(self.number, index, cached_tokens))

    def delta(self, index: int, piece: TokenPiece) -> None:
        if self.feed is not None:
            gateway, number = self.feed
            start = self.sent.get(index, 0)
            self.sent[index] = start + len(piece[0])
            self.pieces.add(gateway, piece_tuple(number, index, start, piece))

    def done(self, result: Answer | RankletError) -> None:
        self.finished(self.number)
        self.pieces.flush()  # of the same step: they come before the answer
        self.outbox.put(Reply(self.number, _picklable(result)))


class Worker:
    """Runs one engine and answers the messages of the parent process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox = Outbox(connection)
        self._pieces = StepPieces(self._outbox)
        self._made: Engine | None = None
        self._tickets: dict[int, Ticket] = {}
        self._loads = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="load")
        self._stopped = threading.Event()
        self._methods: dict[str, Callable[..., None]] = {
            "make": self._make, "start": self._start, "submit": self._submit, "load": self._load, "stop": self._stop,
            **{name: self._reply_with(name) for name in QUICK_CALLS},
        }  # fmt: skip

    def serve(self) -> None:
        """Answer messages until `stop`. Ends the process at once if the parent process is gone."""
        while not self._stopped.is_set():
            try:
                messages = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            for message in messages:
                self._on_message(message)
        self._outbox.close()

    def _on_message(self, message: MethodCall | Cancel | Finish | Prefetch) -> None:
        if isinstance(message, Prefetch):
            self._engine.prefetch(message.adapter)
        elif isinstance(message, Cancel):
            ticket = self._tickets.pop(message.number, None)
            if ticket is not None:
                ticket.cancel()
        elif isinstance(message, Finish):
            ticket = self._tickets.get(message.number)
            if ticket is not None:
                ticket.finish(message.index)
        else:
            self._call(message)

    def _call(self, call: MethodCall) -> None:
        try:
            self._methods[call.method](call.number, *call.arguments)
        except RankletError as error:
            self._reply(call.number, error)
        except Exception as error:
            logger.exception("%s failed", call.method)
            self._reply(call.number, InternalError(f"the engine failed: {type(error).__name__}: {error}"))

    def _reply(self, number: int, result: Any) -> None:
        self._outbox.put(Reply(number, _picklable(result)))

    def _make(self, number: int, config: EngineConfig) -> None:
        self._made = Engine(config, _EventListener(self._outbox, self._pieces, self._send_state))
        self._reply(number, self._made.limits)

    def _start(self, number: int) -> None:
        self._engine.start()
        freeze_garbage_collector()
        self._send_state()
        threading.Thread(target=self._send_states, name="ranklet-state", daemon=True).start()
        self._reply(number, None)

    def _submit(
        self, number: int, prompts: list[NDArray[np.int32]], adapter: AdapterRef | None, params: Params,
        given: list[NDArray[np.int32]], feed: FeedKey | None, key_name: str,
    ) -> None:  # fmt: skip
        sent = {index: len(tokens) for index, tokens in enumerate(given)}
        sink = _ReplySink(number, self._outbox, self._forget, self._pieces, feed, sent)
        ticket = self._engine.submit(prompts, adapter, params, sink, given=given, key_name=key_name)
        if ticket.is_open:
            self._tickets[number] = ticket
            if not ticket.is_open:  # answered since the first check, perhaps before it was in `_tickets`
                self._forget(number)

    def _forget(self, number: int) -> None:
        self._tickets.pop(number, None)

    def _load(self, number: int, adapter: AdapterRef) -> None:
        def run() -> None:
            try:
                self._reply(number, self._engine.load(adapter))
            except RankletError as error:
                self._reply(number, error)
            except Exception as error:
                self._reply(number, InternalError(f"{type(error).__name__}: {error}"))

        self._loads.submit(run)

    def _reply_with(self, method: str) -> Callable[..., None]:
        def call(number: int, *arguments: Any) -> None:
            self._reply(number, getattr(self._engine, method)(*arguments))

        return call

    def _stop(self, number: int) -> None:
        if self._made is not None:
            self._made.stop()
        self._stopped.set()
        self._reply(number, None)

    @property
    def _engine(self) -> Engine:
        assert self._made is not None, "`make` is the first call"
        return self._made

    def _send_state(self) -> None:
        if self._made is not None:
            engine = self._made
            self._outbox.put(EngineState(engine.problem(), engine.held(), engine.stuck_s()))

    def _send_states(self) -> None:
        for number in itertools.count():
            if self._stopped.wait(_STATE_INTERVAL_S):
                return
            self._engine.expire()
            if number % _STATES_PER_CHECK == 0:
                self._check_integrity()
            self._send_state()

    def _check_integrity(self) -> None:
        try:
            self._engine.check_integrity()
        except IntegrityError:
            logger.exception("this engine is unhealthy from now on")


def _picklable(result: Any) -> Any:
    return result.with_traceback(None) if isinstance(result, RankletError) else result


class _EventListener(Listener):
    """Sends the engine's events to the parent process."""

    def __init__(self, outbox: Outbox, pieces: StepPieces, send_state: Callable[[], None]) -> None:
        self._outbox = outbox
        self._pieces = pieces
        self._send_state = send_state

    def batch(self, record: BatchRecord) -> None:
        """Send the pieces and the record of a step."""
        self._pieces.flush()
        self._outbox.put(EngineEvent("batch", record))

    def load(self, record: LoadRecord) -> None:
        self._outbox.put(EngineEvent("load", record))
        self._send_state()

    def loading(self, adapter: str) -> None:
        self._send_state()

    def evicted(self, adapter: str) -> None:
        self._outbox.put(EngineEvent("evicted", adapter))
        self._send_state()

    def tier_hit(self, tier: str) -> None:
        self._outbox.put(EngineEvent("tier_hit", tier))

    def cancelled(self, prompts: int) -> None:
        self._outbox.put(EngineEvent("cancelled", prompts))


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter(logging.Formatter("%(asctime)s %(levelname)s engine %(name)s: %(message)s")))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    Worker(Connection(int(sys.argv[1]))).serve()
