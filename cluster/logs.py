"""Serve's log of this process: where it is, and what must not be in it."""

import logging
import logging.handlers
import os
import socket
from collections.abc import Iterable

from ranklet.replicas.escape import EscapingFormatter


def log_place() -> str:
    """Return the file of the log and its machine, for messages that refer to it."""
    for handler in logging.getLogger("ray.serve").handlers:
        file = getattr(getattr(handler, "target", None) or handler, "baseFilename", None)  # Serve buffers its file
        if file not in (None, os.devnull):
            return f"{file} on {socket.gethostname()}"
    return "Serve's log"


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
