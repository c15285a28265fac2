"""A program in a process of its own, for work whose time and memory no check can bound within this process."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from ranklet.replicas.errors import InternalError

_START_S = 30.0
_REFUSED_S = 60.0


class BoundedProcess:
    """Answers questions by a program that is started at the first one, one question at a time. Thread-safe.

    A question that takes too much time or memory is refused for a minute, so that it delays the others only once.

    Questions and replies are JSON, and this process unpickles nothing: what runs there may come from anyone. A reply is
    an object; any other ends the process. It may have `error`, and `ends` if the process must end or has ended.

    Args:
        program: module that is run with a file descriptor, `time_s` and `memory_bytes`. It sends one message when it is
            ready, and then one for each question.
        purpose: what the program does, for messages.
        time_s: limit of one question.
        grace_s: time after which the process is ended that has not replied by `time_s`.
        memory_bytes: limit of the process's address space.
        clock: monotonic seconds.
    """

    def __init__(
        self, program: str, purpose: str, *, time_s: float, grace_s: float, memory_bytes: int, max_reply_bytes: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:  # fmt: skip
        self._program = program
        self._purpose = purpose
        self._time_s = time_s
        self._grace_s = grace_s
        self._memory_bytes = memory_bytes
        self._max_reply_bytes = max_reply_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._running: tuple[Connection, subprocess.Popen[bytes]] | None = None
        self._refused: dict[str, tuple[float, str]] = {}  # until when and why, by subject

    def ask(self, subject: str, question: bytes) -> dict[str, Any]:
        """Return the reply. Blocks.

        Args:
            subject: what is refused for a minute if the process ends.

        Raises:
            InternalError: the process does not start.
        """
        with self._lock:
            until_s, why = self._refused.get(subject, (0.0, ""))
            if self._clock() < until_s:
                return {"error": f"{why}. It is refused for {until_s - self._clock():.0f} s", "ends": True}
            reply = self._reply(question)
            if reply.get("ends"):
                self._end()
                self._refuse(subject, str(reply.get("error")))
        return reply

    def start(self) -> None:
        """Start the process unless it runs, so that the first question does not wait for that. Blocks."""
        with self._lock:
            self._connect()

    def stop(self) -> None:
        """End the process. The next question starts another."""
        with self._lock:
            self._end()

    def _reply(self, question: bytes) -> dict[str, Any]:
        """Return the reply of the process, which is killed once it is late, whatever it waits for."""
        connection, process = self._connect()
        is_late = threading.Event()

        def kill() -> None:
            is_late.set()
            process.kill()

        limit = threading.Timer(self._time_s + self._grace_s, kill)
        limit.start()
        try:
            connection.send_bytes(question)
            reply = json.loads(connection.recv_bytes(self._max_reply_bytes))
        except (OSError, EOFError, ValueError, RecursionError):
            reply = None
        finally:
            limit.cancel()
        if isinstance(reply, dict):
            return reply
        late, ended = f"it takes more than {self._time_s:g} s", f"it ended the process that {self._purpose}"
        return {"error": late if is_late.is_set() else ended, "ends": True}

    def _refuse(self, subject: str, why: str) -> None:
        now_s = self._clock()
        self._refused = {each: kept for each, kept in self._refused.items() if now_s < kept[0]}
        self._refused[subject] = now_s + _REFUSED_S, why

    def _connect(self) -> tuple[Connection, "subprocess.Popen[bytes]"]:
        if self._running and self._running[1].poll() is None:
            return self._running
        self._end()
        try:
            connection, theirs = Pipe()
            with theirs:
                limits = (str(self._time_s), str(self._memory_bytes))
                command = [sys.executable, "-m", self._program, str(theirs.fileno()), *limits]
                process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=child_environment())
            self._running = connection, process
            self._end_running = weakref.finalize(self, _end_process, process, connection)
            if connection.poll(_START_S):
                connection.recv_bytes()
                return self._running
        except (OSError, EOFError):
            pass
        self._end()
        raise InternalError(f"the process that {self._purpose} does not start")

    def _end(self) -> None:
        if self._running is not None:
            self._running = None
            self._end_running()


def child_environment() -> dict[str, str]:
    """Return the environment of a Python program that imports what this process can import."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def limit_this_process(memory_bytes: int) -> None:
    """Limit the address space of this process, where the system can, and let it leave no core file."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_questions(answer: Callable[[Any], dict[str, Any]]) -> None:
    """Run the program of a `BoundedProcess`: limit its memory, and answer until a reply has `ends`, or nobody asks."""
    descriptor, memory_bytes = int(sys.argv[1]), int(sys.argv[3])
    limit_this_process(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    reply: dict[str, Any] = {}
    while not reply.get("ends"):
        try:
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        reply = answer(question)
        connection.send_bytes(json.dumps(reply, ensure_ascii=False).encode(errors="surrogatepass"))


def _end_process(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()
