"""The state file of a local cluster: its addresses, and the process that `ranklet down` stops."""

from dataclasses import dataclass
from pathlib import Path

from ranklet.cluster.command.own_folder import OwnFolder
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
    drain_s: float = 0.0  # longest wait for requests in flight before a stop
    chosen_port: bool = False  # --port replaced the configuration's port

    def write(self) -> None:
        OwnFolder(Path(self.temp_dir)).write_state(STATE_FILE, self)

    @property
    def is_running(self) -> bool:
        return process_start_time(self.pid) == self.start_time

    @property
    def session(self) -> Path:
        """Folder of Ray's current session."""
        return ray_dir(Path(self.temp_dir)) / "session_latest"

    @property
    def logs(self) -> Path:
        """Folder of the logs of gateways and replicas."""
        return self.session / "logs" / "serve"


def ray_dir(temp_dir: Path) -> Path:
    """Return Ray's temporary folder, which every user of the machine can read."""
    return temp_dir / "ray"


def find_cluster(temp_dir: Path) -> ClusterState | None:
    """Return the cluster that runs under `temp_dir`, if there is one. Raises as `read_state` does."""
    state = read_state(temp_dir)
    return state if state is not None and state.is_running else None


def read_state(temp_dir: Path) -> ClusterState | None:
    """Return the last state of the cluster under `temp_dir`, which may have ended.

    Raises:
        ValueError: the folder or its state file belongs to another user.
        OSError: the folder or its state file is a link, or cannot be read.
    """
    return OwnFolder(temp_dir).read_state(STATE_FILE, ClusterState)
