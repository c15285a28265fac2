"""Escapes what Serve's log files and terminals would obey. A request's id and an adapter's name come from clients."""

import logging
import logging.handlers
from collections.abc import Iterable

from ranklet.replicas.escape import escape

_LINES = "\n\t"  # of tracebacks and of lists of findings


class EscapingFormatter(logging.Formatter):
    """Formats as another formatter does, and escapes the result."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return escape(self._formatter.format(record), keep=_LINES)


def escape_log() -> None:
    """Let the handlers of Serve's logger escape. Serve makes new handlers when `logging_config` changes."""
    for handler in _handlers(logging.getLogger("ray.serve").handlers):
        if handler.formatter is not None and not isinstance(handler.formatter, EscapingFormatter):
            handler.setFormatter(EscapingFormatter(handler.formatter))


def _handlers(handlers: Iterable[logging.Handler]) -> Iterable[logging.Handler]:
    for handler in handlers:
        target = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else None
        yield handler if target is None else target
