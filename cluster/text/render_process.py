"""The process that renders the chat templates of adapters, as the gateway sees it."""

import json
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final, Protocol

from ranklet.cluster.text.template_language import reason_of, render
from ranklet.replicas.bounded_process import BoundedProcess

MAX_PROMPT_CHARS: Final = 8 << 20
MAX_VARIABLES_BYTES: Final = 16 << 20
_MAX_REPLY_BYTES = 6 * MAX_PROMPT_CHARS + 1024  # JSON writes a control character in six bytes
_PROGRAM = "ranklet.cluster.text.render_worker"
_GRACE_S = 1.0  # the process itself ends a template that is late, unless it is busy with a single operation


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
        self._process = BoundedProcess(
            _PROGRAM, "renders chat templates", time_s=time_s, grace_s=_GRACE_S, memory_bytes=memory_bytes,
            max_reply_bytes=_MAX_REPLY_BYTES, clock=clock,
        )  # fmt: skip

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return the text of a template. Starts the process if it does not run. Blocks.

        Raises:
            TemplateFailedError: the template fails, or takes too much time or memory.
            InternalError: the process does not start.
        """
        reply = self._process.ask(source, _request(source, variables))
        if "text" in reply:
            return str(reply["text"])
        raise TemplateFailedError(str(reply.get("error")))

    def stop(self) -> None:
        """End the process. The next rendering starts another."""
        self._process.stop()


def _request(source: str, variables: Mapping[str, Any]) -> bytes:
    try:
        content = json.dumps(variables, ensure_ascii=False)
    except RecursionError:
        raise TemplateFailedError("expected messages and arguments that are nested less deeply") from None
    if len(content) > MAX_VARIABLES_BYTES:
        raise TemplateFailedError(f"expected messages of at most {MAX_VARIABLES_BYTES} bytes, got {len(content)}")
    head = json.dumps({"source": source, "max_chars": MAX_PROMPT_CHARS})
    return f'{head[:-1]}, "variables": {content}}}'.encode(errors="surrogatepass")
