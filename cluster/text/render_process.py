"""The process that renders the chat templates of adapters, as the gateway sees it."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Final, Protocol

from ranklet.cluster.text.template_language import reason_of, render
from ranklet.replicas.errors import InternalError

MAX_PROMPT_CHARS: Final = 8 << 20
MAX_VARIABLES_BYTES: Final = 16 << 20
_MAX_REPLY_BYTES = 6 * MAX_PROMPT_CHARS + 1024  # JSON writes a control character in six bytes
_PROGRAM = "ranklet.cluster.text.render_worker"
_START_S = 30.0
_GRACE_S = 1.0  # the process itself ends a template that is late, unless it is busy with a single operation
_REFUSED_S = 60.0


class TemplateFailedError(Exception):
    """A template did not render; the message says why."""


class Renderer(Protocol):
    """Renders templates."""

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return the text of a template. Blocks.

        Raises:
            TemplateFailedError: the template fails.
        """
        ...


class TrustedRenderer:
    """Renders the base model's template, which the operator has chosen, in this process and without a time limit."""

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        try:
            return render(source, variables, MAX_PROMPT_CHARS)
        except Exception as error:
            raise TemplateFailedError(reason_of(error)) from error


class RenderProcess:
    """Renders the templates of adapters in a process of their own, one at a time. Thread-safe.

    A template that takes too much time or memory is refused for a minute, so that it delays the others only once.

    Args:
        time_s: limit of one rendering.
        memory_bytes: limit of the process's address space.
        clock: monotonic seconds.
    """

    def __init__(
        self, time_s: float = 2.0, memory_bytes: int = 512 << 20, clock: Callable[[], float] = monotonic
    ) -> None:
        self._time_s = time_s
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._refused: dict[str, tuple[float, str]] = {}  # until when and why, by template

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return the text of a template. Starts the process if it does not run. Blocks.

        Raises:
            TemplateFailedError: the template fails, or takes too much time or memory.
            InternalError: the process does not start.
        """
        request = _request(source, variables)
        with self._lock:
            self._check(source)
            try:
                reply = self._ask(request)
            except (OSError, EOFError, ValueError):
                reply = {"error": "it ended the process that renders templates", "ends": True}
            if reply.get("ends"):
                self._end()
                self._refuse(source, reply["error"])
        if "text" in reply:
            return str(reply["text"])
        raise TemplateFailedError(str(reply.get("error")))

    def stop(self) -> None:
        """End the process. The next rendering starts another."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        """Return the reply of the process.

        Raises:
            OSError, EOFError, ValueError: the process has ended, or its reply is no JSON.
        """
        connection = self._start()
        connection.send_bytes(request)
        if not connection.poll(self._time_s + _GRACE_S):
            return {"error": f"it takes more than {self._time_s:g} s", "ends": True}
        reply: dict[str, Any] = json.loads(connection.recv_bytes(_MAX_REPLY_BYTES))
        return reply

    def _check(self, source: str) -> None:
        until_s, why = self._refused.get(source, (0.0, ""))
        if self._clock() < until_s:
            raise TemplateFailedError(f"{why}. It is refused for {until_s - self._clock():.0f} s")

    def _refuse(self, source: str, why: str) -> None:
        now_s = self._clock()
        self._refused = {each: kept for each, kept in self._refused.items() if now_s < kept[0]}
        self._refused[source] = now_s + _REFUSED_S, why

    def _start(self) -> Connection:
        if self._running and self._running[0].poll() is None:
            return self._running[1]
        self._end()
        connection, theirs = Pipe()
        with theirs:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            limits = (str(self._time_s), str(self._memory_bytes))
            command = [sys.executable, "-m", _PROGRAM, str(theirs.fileno()), *limits]
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment)
        self._running = process, connection
        self._end_running = weakref.finalize(self, _end_process, process, connection)
        try:
            if connection.poll(_START_S):
                connection.recv_bytes()
                return connection
        except (OSError, EOFError):
            pass
        self._end()
        raise InternalError("the process that renders chat templates does not start")

    def _end(self) -> None:
        if self._running is not None:
            self._running = None
            self._end_running()


def _end_process(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def _request(source: str, variables: Mapping[str, Any]) -> bytes:
    try:
        content = json.dumps(variables, ensure_ascii=False)
    except RecursionError:
        raise TemplateFailedError("expected messages and arguments that are nested less deeply") from None
    if len(content) > MAX_VARIABLES_BYTES:
        raise TemplateFailedError(f"expected messages of at most {MAX_VARIABLES_BYTES} bytes, got {len(content)}")
    head = json.dumps({"source": source, "max_chars": MAX_PROMPT_CHARS})
    return f'{head[:-1]}, "variables": {content}}}'.encode(errors="surrogatepass")
