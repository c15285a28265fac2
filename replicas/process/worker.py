"""The program of an engine's process: `python -m ranklet.replicas.process.worker FD`, FD a socket to the one that asks.

The engine has this interpreter for itself: no HTTP and no RPC competes with the thread that launches batches.
"""

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef, LoadRecord
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.request import Answer, Ticket
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.errors import InternalError, RankletError
from ranklet.replicas.process.messages import Cancel, EngineEvent, EngineState, MethodCall, Outbox, Prefetch, Reply

_BEAT_S = 0.5
_SWITCH_S = 0.0005  # a thread that waits for the interpreter asks for it after so long, not Python's 5 ms
_LOADERS = 4  # calls of `load` at once; the engine has its own threads behind them

logger = logging.getLogger(__name__)


class Worker:
    """One engine, called by messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox = Outbox(connection)
        self._engine: Engine | None = None
        self._tickets: dict[int, Ticket] = {}
        self._loads = ThreadPoolExecutor(_LOADERS, thread_name_prefix="load")
        self._stopped = threading.Event()
        self._methods: dict[str, Callable[..., None]] = {
            "make": self._make, "start": self._start, "submit": self._submit, "load": self._load,
            "snapshot": self._answering("snapshot"), "report": self._answering("report"), "pin": self._answering("pin"),
            "release": self._answering("release"), "stop": self._stop,
        }  # fmt: skip

    def serve(self) -> None:
        """Answer until told to stop. When the other end is gone nobody waits for anything: end at once."""
        while not self._stopped.is_set():
            try:
                messages = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            for message in messages:
                self._take(message)
        self._outbox.close()

    def _take(self, message: MethodCall | Cancel | Prefetch) -> None:
        if isinstance(message, Prefetch):
            self._made.offer(message.adapter)
            return
        if isinstance(message, Cancel):
            ticket = self._tickets.pop(message.number, None)
            if ticket is not None:
                ticket.cancel()
            return
        try:
            self._methods[message.method](message.number, *message.arguments)
        except RankletError as error:
            self._reply(message.number, error)
        except Exception as error:
            logger.exception("%s failed", message.method)
            self._reply(message.number, InternalError(f"the engine failed: {type(error).__name__}: {error}"))

    def _reply(self, number: int, result: Any) -> None:
        if isinstance(result, RankletError):
            result = result.with_traceback(None)
        self._outbox.put(Reply(number, result))

    def _make(self, number: int, config: EngineConfig) -> None:
        self._engine = Engine(config, _Reporter(self._outbox, self.tell))
        self._reply(number, self._engine.limits)

    def _start(self, number: int) -> None:
        self._made.start()
        _freeze()
        self.tell()
        threading.Thread(target=self._beat, name="ranklet-beat", daemon=True).start()
        self._reply(number, None)

    def _submit(
        self, number: int, prompts: list[NDArray[np.int32]], adapter: AdapterRef | None, dimensions: int | None
    ) -> None:
        def done(result: Answer | RankletError) -> None:
            self._tickets.pop(number, None)
            self._reply(number, result)

        ticket = self._made.submit(prompts, adapter, dimensions, done)
        if ticket.call.open:
            self._tickets[number] = ticket
            if not ticket.call.open:  # answered between the two lines
                self._tickets.pop(number, None)

    def _load(self, number: int, adapter: AdapterRef) -> None:
        def run() -> None:
            try:
                self._reply(number, self._made.load(adapter))
            except Exception as error:
                expected = isinstance(error, RankletError)
                self._reply(number, error if expected else InternalError(f"{type(error).__name__}: {error}"))

        self._loads.submit(run)

    def _answering(self, method: str) -> Callable[..., None]:
        """Calls a quick method of the engine and replies with what it returns."""

        def call(number: int, *arguments: Any) -> None:
            self._reply(number, getattr(self._made, method)(*arguments))

        return call

    def _stop(self, number: int) -> None:
        if self._engine is not None:
            self._engine.stop()
        self._stopped.set()
        self._reply(number, None)

    @property
    def _made(self) -> Engine:
        assert self._engine is not None, "`make` comes first"
        return self._engine

    def tell(self) -> None:
        """Say how the engine is."""
        if self._engine is not None:
            engine = self._engine
            self._outbox.put(EngineState(engine.healthy(), engine.held(), engine.stuck_s()))

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT_S):
            self._made.expire()
            self.tell()


def _freeze() -> None:
    """Spare the collector what is here to stay: 300,000 objects, most of PyTorch, and each walk over them holds up
    launches for 0.2 s of a slow core. The last collection tells it how little is left to walk over.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


class _Reporter(Listener):
    """Sends the engine's records on."""

    def __init__(self, outbox: Outbox, changed: Callable[[], None]) -> None:
        self._outbox = outbox
        self._changed = changed

    def batch(self, record: BatchRecord) -> None:
        self._outbox.put(EngineEvent("batch", record))

    def load(self, record: LoadRecord) -> None:
        self._outbox.put(EngineEvent("load", record))
        self._changed()

    def evicted(self, adapter: str) -> None:
        self._outbox.put(EngineEvent("evicted", adapter))
        self._changed()

    def tier_hit(self, tier: str) -> None:
        self._outbox.put(EngineEvent("tier_hit", tier))

    def cancelled(self, requests: int) -> None:
        self._outbox.put(EngineEvent("cancelled", requests))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    sys.setswitchinterval(_SWITCH_S)
    Worker(Connection(int(sys.argv[1]))).serve()
