"""An engine in a child process. Imports no torch.

Python runs one thread at a time: an engine in the process of an RPC server loses a tenth of its time to that server.
"""

import itertools
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from time import monotonic
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, HeldAdapters
from ranklet.replicas.bounded_process import child_environment
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.api import EngineApi, QuickCalls
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import Params
from ranklet.replicas.engine.request import AnswerSink, Sink
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.errors import AdapterLoadCrashed, RankletError, Unavailable
from ranklet.replicas.process.messages import (
    Cancel,
    EngineEvent,
    EngineState,
    FeedKey,
    FeedPieces,
    Finish,
    MethodCall,
    Outbox,
    Prefetch,
    Reply,
    TextBegun,
    token_piece,
    unpack_pieces,
)

_PROGRAM = "ranklet.replicas.process.worker"
_HUNG_AFTER_S = 10.0  # after this long without a message the process counts as hung
_PAUSED_AFTER_S = 2.0  # after this long without a message, or with one step, no answer is expected soon
_QUICK_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 30.0
_THIS_PROCESS = ""  # in a FeedKey, in the place of a gateway

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class RemoteTicket:
    """The caller's handle of a request; see `ranklet.replicas.engine.request.Ticket`."""

    cancel: Callable[[], None]
    finish: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    sink: Sink
    adapter: AdapterRef | None


def _quick(method: Callable[Concatenate[QuickCalls, P], R]) -> Callable[Concatenate["EngineProcess", P], R]:
    """Make a method of `EngineProcess` that calls the engine's method of the same name.

    The method raises Unavailable if the process has ended, and TimeoutError if the process does not answer.
    """

    def call(self: "EngineProcess", /, *arguments: P.args, **keywords: P.kwargs) -> R:
        assert not keywords, "arguments travel by position"
        result: R = self.call(method.__name__, *arguments).result(_QUICK_CALL_TIMEOUT_S)
        return result

    return call


class EngineProcess(EngineApi):
    """Runs an `Engine` in a child process. `submit` raises nothing: its sink receives every error.

    Raises:
        ModelError: the model folder cannot be served; the message says why.
        Unavailable: the process ended before it had made its engine.
    """

    pin = _quick(QuickCalls.pin)
    release = _quick(QuickCalls.release)
    report = _quick(QuickCalls.report)
    snapshot = _quick(QuickCalls.snapshot)

    def __init__(self, config: EngineConfig, *listeners: Listener) -> None:
        self._listeners = listeners
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", _PROGRAM, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=child_environment())
        self._outbox = Outbox(self._connection)
        self._numbers = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._has_ended = False
        self._state = EngineState("the engine has not started", HeldAdapters())
        self._last_message_s = monotonic()
        self._receiver = threading.Thread(target=self._receive, name="ranklet-replies", daemon=True)
        self._receiver.start()
        try:
            self.limits: RequestLimits = self.call("make", config).result()
        except RankletError:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def open_calls(self) -> int:
        """Number of calls without a reply."""
        return len(self._waiting)

    def start(self) -> None:
        self.call("start").result()

    def stop(self) -> None:
        """Stop the engine and end the process. Calls after this one fail at once."""
        try:
            self.call("stop").result(_STOP_TIMEOUT_S)
        except (RankletError, TimeoutError):
            self._process.kill()
        self._process.wait()
        self._receiver.join(_STOP_TIMEOUT_S)  # it notices the end of the process

    def submit(
        self, prompts: Sequence[NDArray[np.int32]], adapter: AdapterRef | None, params: Params, sink: Sink,
        feed: FeedKey | None = None, *, given: Sequence[NDArray[np.int32]] = (), key_name: str = "",
    ) -> RemoteTicket:  # fmt: skip
        """Send a request to the engine; see `Engine.submit`.

        Args:
            feed: the listeners receive the request's pieces for this gateway, and `sink` receives none. Without a
                feed, a request for an `AnswerSink` has no pieces.
        """
        number = next(self._numbers)
        if feed is None and not isinstance(sink, AnswerSink):
            feed = FeedKey(_THIS_PROCESS, number)
        arguments = (list(prompts), adapter, params, list(given), feed, key_name)
        self._send(number, "submit", arguments, _Waiting(sink, adapter))

        def cancel() -> None:
            with self._lock:
                self._waiting.pop(number, None)
            self._outbox.put(Cancel(number))

        return RemoteTicket(cancel, lambda index: self._outbox.put(Finish(number, index)))

    def load(self, adapter: AdapterRef) -> AdapterInfo:
        info: AdapterInfo = self.call("load", adapter, adapter=adapter).result()
        return info

    def prefetch(self, adapter: AdapterRef) -> None:
        self._outbox.put(Prefetch(adapter))

    def held(self) -> HeldAdapters:
        """Return the adapters that the engine held at its last state message."""
        return self._state.held

    def healthy(self) -> bool:
        return self.problem() is None

    def problem(self) -> str | None:
        """Return why the engine is unhealthy: its process ended or is silent, or the engine reports a problem."""
        if self._has_ended:
            return "the engine's process has ended"
        silent_s = monotonic() - self._last_message_s
        if silent_s >= _HUNG_AFTER_S:
            return f"the engine's process has been silent for {silent_s:.0f} s"
        return self._state.problem

    def at_work(self) -> bool:
        """Whether answers can be expected soon: the process is healthy, is not silent, and no step takes long."""
        silent_s = monotonic() - self._last_message_s
        return self.healthy() and max(silent_s, self._state.stuck_s) <= _PAUSED_AFTER_S

    def call(self, method: str, *arguments: Any, adapter: AdapterRef | None = None) -> "Future[Any]":
        """Send a call of an engine's method. `adapter` is the adapter that the call loads, if any."""
        future: Future[Any] = Future()

        def done(result: Any) -> None:
            if isinstance(result, RankletError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._send(next(self._numbers), method, arguments, _Waiting(AnswerSink(done), adapter))
        return future

    def _send(self, number: int, method: str, arguments: tuple[Any, ...], waiting: _Waiting) -> None:
        with self._lock:
            has_ended = self._has_ended
            if not has_ended:
                self._waiting[number] = waiting
        if has_ended:
            waiting.sink.done(_process_ended())
        else:
            self._outbox.put(MethodCall(number, method, arguments))

    def _receive(self) -> None:
        try:
            while True:
                for message in self._connection.recv():
                    self._on_message(message)
        except (EOFError, OSError):
            pass
        with self._lock:
            self._has_ended = True
            waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            self._notify(each.sink.done, self._error_at_end(each.adapter))
        if waiting:
            logger.error("the engine's process %d has ended with %d open calls", self._process.pid, len(waiting))

    def _on_message(self, message: Reply | TextBegun | FeedPieces | EngineEvent | EngineState) -> None:
        self._last_message_s = monotonic()
        if isinstance(message, FeedPieces):
            self._on_pieces(message)
        elif isinstance(message, TextBegun):
            waiting = self._waiting.get(message.number)
            if waiting is not None:
                self._notify(waiting.sink.begun, message.index, message.cached_tokens)
        elif isinstance(message, EngineState):
            changed, self._state = message.held != self._state.held, message
            for listener in self._listeners if changed else ():
                self._notify(listener.holdings_changed, message.held)
        elif isinstance(message, EngineEvent):
            for listener in self._listeners:
                self._notify(getattr(listener, message.method), message.record)
        else:
            with self._lock:
                found = self._waiting.pop(message.number, None)
            if found is not None:
                self._notify(found.sink.done, message.result)

    def _on_pieces(self, message: FeedPieces) -> None:
        if message.gateway != _THIS_PROCESS:
            for listener in self._listeners:
                self._notify(listener.pieces, message.gateway, message.data)
            return
        for piece in unpack_pieces(message.data):
            found = self._waiting.get(piece[0])
            if found is not None:
                self._notify(found.sink.delta, piece[1], token_piece(piece))

    def _error_at_end(self, adapter: AdapterRef | None) -> RankletError:
        # An adapter that was loading may be the cause. Its requests must not be repeated on another replica.
        if adapter is not None and adapter.name in self._state.held.loading:
            return AdapterLoadCrashed(
                f"adapter {adapter.name!r}: the engine's process ended while it loaded this adapter. Check the adapter "
                "with `ranklet adapters verify` before it is asked for again"
            )
        return _process_ended()

    @staticmethod
    def _notify(method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:  # a defect of the caller must not end the thread that answers every call
            logger.exception("a callback of the engine failed")


def _process_ended() -> Unavailable:
    return Unavailable("the engine's process has ended; this replica is being replaced. Send the request again")
