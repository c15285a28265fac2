"""The state file of a local cluster: its addresses, and the process that `ranklet down` stops."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ranklet.cluster.command.processes import process_start_time

STATE_FILE = "ranklet.json"


@dataclass(frozen=True)
class ClusterState:
    """The addresses and the main process of a local cluster."""

    base_url: str  # of the HTTP API
    address: str  # of Ray, for `ray.init`
    dashboard: str  # of Ray, for `serve -a`
    pid: int  # of `ray start --block`
    start_time: str  # of that process; a later process with the same id has another one
    temp_dir: str

    def write(self) -> None:
        (Path(self.temp_dir) / STATE_FILE).write_text(json.dumps(asdict(self)))

    @property
    def is_running(self) -> bool:
        return process_start_time(self.pid) == self.start_time


def find_cluster(temp_dir: Path) -> ClusterState | None:
    """Return the cluster that runs under `temp_dir`, if there is one."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        state = ClusterState(**json.loads((temp_dir / STATE_FILE).read_text()))
        if state.is_running:
            return state
    return None
