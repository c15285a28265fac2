"""An engine in a process of its own, with the face of `Engine`; imports no torch.

Python runs one thread at a time: an engine beside an RPC server loses a tenth of its batches' time to it.
"""

import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, AdapterReport, HeldAdapters
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.engine.stats import Listener, Snapshot
from ranklet.replicas.errors import RankletError, Unavailable
from ranklet.replicas.process.messages import Cancel, EngineEvent, EngineState, MethodCall, Outbox, Prefetch, Reply

_PROGRAM = "ranklet.replicas.process.worker"
_SILENCE_S = 10.0  # without a sign of life for so long it counts as hung
_PAUSE_S = 2.0  # and is not at work after so long, or with a batch that long on the device
_SNAPSHOT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteTicket:
    """The caller's hold on a submitted request, as `Ticket`."""

    cancel: Callable[[], None]


class EngineProcess:
    """An `Engine` elsewhere: what `submit` would raise comes to `done` instead, but for `Unavailable`.

    Raises:
        ModelError: the model folder cannot be served; the message says why.
        Unavailable: the process ended before its engine was made.
    """

    def __init__(self, config: EngineConfig, *listeners: Listener) -> None:
        self._listeners = listeners
        self._connection, theirs = Pipe()
        with theirs:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-m", _PROGRAM, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment)
        self._outbox = Outbox(self._connection)
        self._numbers = itertools.count()
        self._waiting: dict[int, Callable[[Any], None]] = {}
        self._lock = threading.Lock()
        self._gone = False
        self._state = EngineState(healthy=False, held=HeldAdapters())
        self._heard_s = monotonic()
        threading.Thread(target=self._listen, name="ranklet-replies", daemon=True).start()
        try:
            self.limits: RequestLimits = self._ask("make", config).result()
        except RankletError:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """As `Engine.start`."""
        self._ask("start").result()

    def stop(self) -> None:
        """As `Engine.stop`; the process ends."""
        try:
            self._ask("stop").result(_STOP_TIMEOUT_S)
        except (RankletError, TimeoutError):
            self._process.kill()
        self._process.wait()

    def submit(
        self, prompts: Sequence[NDArray[np.int32]], adapter: AdapterRef | None, dimensions: int | None,
        done: Callable[[Answer | RankletError], None],
    ) -> RemoteTicket:  # fmt: skip
        """As `Engine.submit`, but every refusal goes to `done`, on this object's thread."""
        number = self._call("submit", (list(prompts), adapter, dimensions), done)

        def cancel() -> None:
            with self._lock:
                self._waiting.pop(number, None)
            self._outbox.put(Cancel(number))

        return RemoteTicket(cancel)

    def load(self, adapter: AdapterRef) -> AdapterInfo:
        """As `Engine.load`."""
        info: AdapterInfo = self._ask("load", adapter).result()
        return info

    def pin(self, names: Collection[str]) -> None:
        """As `Engine.pin`."""
        self._ask("pin", tuple(names)).result(_SNAPSHOT_TIMEOUT_S)

    def release(self, name: str, keep: str | None = None) -> bool:
        """As `Engine.release`."""
        return bool(self._ask("release", name, keep).result(_SNAPSHOT_TIMEOUT_S))

    def report(self) -> list[AdapterReport]:
        """As `Engine.report`. Raises as `snapshot` does."""
        found: list[AdapterReport] = self._ask("report").result(_SNAPSHOT_TIMEOUT_S)
        return found

    def offer(self, adapter: AdapterRef) -> None:
        """As `Engine.offer`."""
        self._outbox.put(Prefetch(adapter))

    def snapshot(self) -> Snapshot:
        """As `Engine.snapshot`.

        Raises:
            Unavailable: the process has ended.
            TimeoutError: it does not answer.
        """
        now: Snapshot = self._ask("snapshot").result(_SNAPSHOT_TIMEOUT_S)
        return now

    def resident(self) -> tuple[str, ...]:
        """As `Engine.resident`, as of the last news."""
        return self._state.held.resident

    def healthy(self) -> bool:
        """Whether the process lives, was heard of lately, and calls its engine healthy."""
        return not self._gone and self._state.healthy and monotonic() - self._heard_s < _SILENCE_S

    def held(self) -> HeldAdapters:
        """As `Engine.held`, as of the last news."""
        return self._state.held

    def at_work(self) -> bool:
        """Whether it would answer soon: healthy, heard of just now, and no batch hangs."""
        paused = monotonic() - self._heard_s > _PAUSE_S or self._state.stuck_s > _PAUSE_S
        return self.healthy() and not paused

    def _ask(self, method: str, *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def done(result: Any) -> None:
            if isinstance(result, RankletError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._call(method, arguments, done)
        return future

    def _call(self, method: str, arguments: tuple[Any, ...], done: Callable[[Any], None]) -> int:
        number = next(self._numbers)
        with self._lock:
            gone = self._gone
            if not gone:
                self._waiting[number] = done
        if gone:
            done(_ended())
        else:
            self._outbox.put(MethodCall(number, method, arguments))
        return number

    def _listen(self) -> None:
        try:
            while True:
                for message in self._connection.recv():
                    self._take(message)
        except (EOFError, OSError):
            pass
        with self._lock:
            self._gone = True
            waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            self._tell(done, _ended())
        if waiting:
            logger.error("the engine's process %d has ended with %d requests in it", self._process.pid, len(waiting))

    def _take(self, message: Reply | EngineEvent | EngineState) -> None:
        self._heard_s = monotonic()
        if isinstance(message, EngineState):
            changed, self._state = message.held != self._state.held, message
            if changed:
                for listener in self._listeners:
                    self._tell(listener.holdings_changed, message.held)
        elif isinstance(message, EngineEvent):
            for listener in self._listeners:
                self._tell(getattr(listener, message.method), message.record)
        else:
            with self._lock:
                done = self._waiting.pop(message.number, None)
            if done is not None:
                self._tell(done, message.result)

    @staticmethod
    def _tell(told: Callable[[Any], None], what: Any) -> None:
        try:
            told(what)
        except Exception:  # a caller's defect must not end the thread that answers everyone
            logger.exception("a callback of the engine failed")


def _ended() -> Unavailable:
    return Unavailable("the engine's process has ended; this replica is being replaced. Send the request again")
