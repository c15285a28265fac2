"""Where this process writes Serve's log."""

import logging
import os
import socket


def log_place() -> str:
    """Return the file of the log and its machine, for messages that refer to it."""
    for handler in logging.getLogger("ray.serve").handlers:
        file = getattr(getattr(handler, "target", None) or handler, "baseFilename", None)  # Serve buffers its file
        if file not in (None, os.devnull):
            return f"{file} on {socket.gethostname()}"
    return "Serve's log"
