"""Telling one process from a later one with the same id, and ending it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

_POLL_S = 0.1


def process_start_time(pid: int) -> str | None:
    """When process `pid` began, in the system's own words; None when there is no such process.

    Two processes that had the same id one after the other differ in it.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return said.strip() or None


def notify_systemd(state: str) -> None:
    """Tell systemd (`READY=1`) how this process stands, if it asks to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), name)


def terminate(pid: int, start_time: str, timeout_s: float = 20.0) -> None:
    """Ask process `pid` to end, and kill it when it has not after `timeout_s`. Does nothing if it is another by now."""
    for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
        if process_start_time(pid) != start_time:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        _wait_for_exit(pid, start_time, patience_s)


def _wait_for_exit(pid: int, start_time: str, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while process_start_time(pid) == start_time and time.monotonic() < deadline_s:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # a child of ours would stay as a zombie
        time.sleep(_POLL_S)
