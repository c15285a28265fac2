"""A program in a process of its own, for work whose time and memory no check can bound within this process."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from ranklet.replicas.errors import InternalError

_START_S = 30.0
_REFUSED_S = 60.0
_PIECE_BYTES = 1 << 16


class BoundedProcess:
    """Answers questions by a program that is started at the first one, one question at a time. Thread-safe.

    A question that takes too much time or memory is refused for a minute, so that it delays the others only once.

    Questions and replies are lines of JSON, and this process unpickles nothing: what runs there may come from anyone.
    A reply is an object; any other ends the process. It may have `error`, and `ends` if the process must end or has
    ended.

    Args:
        program: module that is run with a file descriptor, `time_s` and `memory_bytes`. It sends one line when it is
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
        self._running: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
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
        channel = self._connect()
        until_s = monotonic() + self._time_s + self._grace_s
        reply: Any = None
        try:
            channel.settimeout(self._time_s + self._grace_s)
            channel.sendall(question + b"\n")
            reply = json.loads(_read_line(channel, self._max_reply_bytes, until_s))
        except TimeoutError:
            return {"error": f"it takes more than {self._time_s:g} s", "ends": True}
        except (OSError, EOFError, ValueError, RecursionError):
            pass
        if isinstance(reply, dict):
            return reply
        return {"error": f"it ended the process that {self._purpose}", "ends": True}

    def _refuse(self, subject: str, why: str) -> None:
        now_s = self._clock()
        self._refused = {each: kept for each, kept in self._refused.items() if now_s < kept[0]}
        self._refused[subject] = now_s + _REFUSED_S, why

    def _connect(self) -> socket.socket:
        if self._running and self._running[1].poll() is None:
            return self._running[0]
        self._end()
        try:
            channel, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as undo:
                undo.enter_context(channel)
                limits = (str(self._time_s), str(self._memory_bytes))
                command = [sys.executable, "-m", self._program, str(theirs.fileno()), *limits]
                process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=child_environment())
                undo.pop_all()
            self._running = channel, process
            self._end_running = weakref.finalize(self, _end_process, process, channel)
            _read_line(channel, _PIECE_BYTES, monotonic() + _START_S)
        except (OSError, EOFError, ValueError) as error:
            self._end()
            raise InternalError(f"the process that {self._purpose} does not start") from error
        return channel

    def _end(self) -> None:
        if self._running is not None:
            self._running = None
            self._end_running()


def _read_line(channel: socket.socket, most_bytes: int, until_s: float) -> bytes:
    """Return the next line, behind which nothing may come.

    Raises:
        TimeoutError: it is not complete by `until_s`.
        EOFError: the other side has closed the channel.
        ValueError: it is too long.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        left_s = until_s - monotonic()
        if left_s <= 0:
            raise TimeoutError
        channel.settimeout(left_s)
        piece = channel.recv(_PIECE_BYTES)
        if not piece:
            raise EOFError
        line += piece
        if len(line) > most_bytes:
            raise ValueError("the line is too long")
    return bytes(line)


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
    with socket.socket(fileno=descriptor) as channel:
        channel.sendall(b"ready\n")
        for question in _lines(channel):
            reply = answer(json.loads(question))
            channel.sendall(json.dumps(reply, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
            if reply.get("ends"):
                return


def _lines(channel: socket.socket) -> Iterator[bytes]:
    """Yield lines until the other side has ended."""
    with contextlib.suppress(OSError), channel.makefile("rb") as lines:
        yield from lines


def _end_process(process: "subprocess.Popen[bytes]", channel: socket.socket) -> None:
    process.kill()
    process.wait()
    channel.close()
