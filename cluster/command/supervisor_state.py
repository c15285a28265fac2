"""The state file of the process that starts the cluster of `ranklet up` again after Ray was lost."""

import time
from dataclasses import dataclass
from pathlib import Path

from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.processes import process_start_time, terminate

SUPERVISOR_FILE = "supervisor.json"
_POLL_S = 0.1
_END_S = 10.0


@dataclass(frozen=True)
class SupervisorState:
    """A supervisor and what it did."""

    pid: int
    start_time: str  # of the process; a later process with the same id has another one
    restarts: int = 0  # how often it has started Ray again, with success
    said: str = ""  # its last message, with the time

    def write(self, temp_dir: Path) -> None:
        OwnFolder(temp_dir).write_state(SUPERVISOR_FILE, self)

    @property
    def is_running(self) -> bool:
        return process_start_time(self.pid) == self.start_time

    def end(self) -> None:
        """Wait until the supervisor of a cluster that is being stopped ends by itself. End it if it does not."""
        deadline_s = time.monotonic() + _END_S
        while self.is_running and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        terminate(self.pid, self.start_time)


def find_supervisor(temp_dir: Path) -> SupervisorState | None:
    """Return the supervisor that runs for `temp_dir`, if there is one. Raises as `read_supervisor` does."""
    state = read_supervisor(temp_dir)
    return state if state is not None and state.is_running else None


def read_supervisor(temp_dir: Path) -> SupervisorState | None:
    """Return the state of the last supervisor, which may have given up.

    Raises:
        ValueError: the folder or the state file belongs to another user.
        OSError: the folder or the state file is a link, or cannot be read.
    """
    return OwnFolder(temp_dir).read_state(SUPERVISOR_FILE, SupervisorState)
