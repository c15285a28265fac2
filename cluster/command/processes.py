"""Start and end of processes, by id, and notifications to systemd."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 0.1
_KILL_TIMEOUT_S = 5.0


def process_start_time(pid: int) -> str | None:
    """Return when process `pid` started, in the system's own format; None if there is no such process.

    Two processes that had the same id one after the other differ in it.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def child_processes(pid: int) -> dict[int, str]:
    """Return the command line of each child of a process, by its id. Linux only; empty elsewhere."""
    found = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def kill_session(leader: int) -> None:
    """Kill all processes of a session whose leader has ended, and wait for their end. Linux only."""
    if process_start_time(leader) is not None:
        return
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while (members := list(_session_members(leader))) and time.monotonic() < deadline_s:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _session_members(leader: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                yield int(folder.name)


def notify_systemd(state: str) -> None:
    """Send a state, such as `READY=1`, to systemd if it started this process with `Type=notify`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), name)


def terminate(pid: int, start_time: str, timeout_s: float = 20.0) -> None:
    """Send SIGTERM to process `pid`, and SIGKILL after `timeout_s`.

    Does nothing if the process with this id has another start time.
    """
    for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        if process_start_time(pid) != start_time:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        _wait_for_exit(pid, start_time, wait_s)


def _wait_for_exit(pid: int, start_time: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while process_start_time(pid) == start_time and time.monotonic() < deadline_s:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # otherwise a child of this process stays as a zombie
        time.sleep(_POLL_S)
