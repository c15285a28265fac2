"""Starts the cluster of `ranklet up` again when Ray is lost: `python -m ranklet.cluster.command.supervisor`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ranklet.cluster.command.cluster_state import read_state
from ranklet.cluster.command.console import print_line
from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.processes import child_processes, notify_systemd, process_start_time
from ranklet.cluster.command.ray_head import Proxy
from ranklet.cluster.command.running_cluster import ClusterError, DeploymentFailed
from ranklet.cluster.command.supervisor_state import SUPERVISOR_FILE, SupervisorState

LOG_FILE = "supervisor.log"
DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0)  # before each attempt in a row
_STABLE_S = 300.0  # after so long, a loss begins a new row of attempts
_POLL_S = 0.2
_PARTS = {"gcs_server": "Ray's GCS", "raylet": "Ray's raylet"}  # `ray start` stays if they end by SIGTERM


class Supervisor:
    """Watches a started cluster, and starts it again as long as no command stops it.

    Args:
        timeout_s: longest time of one start.
        delays_s: before each attempt in a row. With the last one that fails, the supervisor gives up.
    """

    def __init__(
        self, cluster: LocalCluster, report: Callable[[str], None], timeout_s: float,
        delays_s: Sequence[float] = DELAYS_S,
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._report = report
        self._timeout_s = timeout_s
        self._delays_s = delays_s
        self._attempts = 0  # in a row
        self._state = _state_of(os.getpid())
        self._folder = OwnFolder(cluster.temp_dir)

    def run(self) -> int:
        """Return 0 once a command has stopped the cluster, and 1 after giving up, which the state file then says."""
        self._state.write(self._cluster.temp_dir)
        notify_systemd("READY=1")
        gave_up = False
        try:
            while (lost := self._wait_for_loss()) is not None:
                self._say(f"{lost} ended unexpectedly")
                if not self._start_again():
                    gave_up = not self._cluster.is_stopping
                    break
            self._say("gave up; `ranklet up` starts Ray again" if gave_up else "another command has stopped Ray")
        finally:
            if not gave_up:
                self._folder.remove(SUPERVISOR_FILE)
        return int(gave_up)

    def _wait_for_loss(self) -> str | None:
        """Return what ended; None if a command has stopped the cluster."""
        began_s, state = time.monotonic(), read_state(self._cluster.temp_dir)
        if state is None:
            return None
        parts = {pid: name for pid, line in child_processes(state.pid).items() if (name := _part(line))}
        while state.is_running:
            gone = [name for pid, name in parts.items() if process_start_time(pid) is None]
            if gone and not self._cluster.is_stopping:
                return gone[0]
            if time.monotonic() - began_s > _STABLE_S:
                self._attempts = 0
            time.sleep(_POLL_S)
        return None if self._cluster.is_stopping else "Ray"

    def _start_again(self) -> bool:
        """Return whether Ray is up. Else a command stops the cluster, or there were too many attempts."""
        proven = False
        for delay_s in self._delays_s[self._attempts :]:
            self._attempts += 1
            self._say(f"attempt {self._attempts} of {len(self._delays_s)} to start Ray again, in {delay_s:g} s")
            self._sleep(delay_s)
            if self._cluster.is_stopping:
                return False
            began_s = time.monotonic()
            try:
                self._cluster.restart(self._timeout_s, proven=proven)
            except (ClusterError, ValueError, OSError) as error:
                proven = proven or isinstance(error, DeploymentFailed)
                remedy = ". The next attempt takes the configuration of the last good start" if proven else ""
                self._say(f"Ray was not started: {error}{remedy}")
            else:
                self._state = replace(self._state, restarts=self._state.restarts + 1)
                self._say(f"Ray was started again in {time.monotonic() - began_s:.1f} s")
                return True
        return False

    def _sleep(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s and not self._cluster.is_stopping:
            time.sleep(_POLL_S)

    def _say(self, line: str) -> None:
        self._report(line)
        notify_systemd(f"STATUS={line}")
        self._state = replace(self._state, said=f"{_now()} {line}")
        self._state.write(self._cluster.temp_dir)


def leave_supervisor(cluster: LocalCluster, proxy: Proxy, timeout_s: float) -> None:
    """Start a process that supervises a started cluster, and that stays when this one ends."""
    command = [sys.executable, "-P", "-m", __spec__.name, str(cluster.temp_dir), proxy, str(timeout_s)]
    folder = OwnFolder(cluster.temp_dir)
    with folder.write(LOG_FILE, "").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _state_of(process.pid).write(cluster.temp_dir)  # `ranklet down` may come before the process has begun


def _state_of(pid: int) -> SupervisorState:
    return SupervisorState(pid, process_start_time(pid) or "")


def _part(command_line: str) -> str | None:
    return _PARTS.get(Path(command_line.partition(" ")[0]).name)


def _print(line: str) -> None:
    print_line(f"{_now()} {line}")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _exit(number: int, frame: object) -> None:
    raise SystemExit(1)


def main(arguments: Sequence[str]) -> int:
    folder, proxy, timeout_s = arguments
    signal.signal(signal.SIGTERM, _exit)
    cluster = LocalCluster(Path(folder), proxy=cast(Proxy, proxy), report=_print)
    return Supervisor(cluster, _print, float(timeout_s)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
