"""Serve's log of this process: where it is, and what must not be in it."""

import logging
import logging.handlers
import os
import socket
from collections.abc import Iterable

from ranklet.replicas.escape import escape

_LINES = "\n\t"  # of tracebacks and of lists of findings


def log_place() -> str:
    """Return the file of the log and its machine, for messages that refer to it."""
    for handler in logging.getLogger("ray.serve").handlers:
        file = getattr(getattr(handler, "target", None) or handler, "baseFilename", None)  # Serve buffers its file
        if file not in (None, os.devnull):
            return f"{file} on {socket.gethostname()}"
    return "Serve's log"


class EscapingFormatter(logging.Formatter):
    """Formats as another formatter does, and escapes the result."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return escape(self._formatter.format(record), keep=_LINES)


def escape_log() -> None:
    """Escape what files and terminals would obey: a request's id and an adapter's name come from clients.

    Serve makes new handlers when `logging_config` changes.
    """
    for handler in _handlers(logging.getLogger("ray.serve").handlers):
        if handler.formatter is not None and not isinstance(handler.formatter, EscapingFormatter):
            handler.setFormatter(EscapingFormatter(handler.formatter))


def _handlers(handlers: Iterable[logging.Handler]) -> Iterable[logging.Handler]:
    for handler in handlers:
        target = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else None
        yield handler if target is None else target
