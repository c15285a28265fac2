"""What the supervisor of `ranklet up` does where Ray does not start again. test_local_cluster.py has real losses."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranklet.cluster.command import cli
from ranklet.cluster.command.cluster_state import ClusterState
from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.processes import process_start_time
from ranklet.cluster.command.ray_head import STOPPING_FILE
from ranklet.cluster.command.running_cluster import ClusterError, DeploymentFailed
from ranklet.cluster.command.supervisor import Supervisor
from ranklet.cluster.command.supervisor_state import SupervisorState, read_supervisor

NO_PROCESS = 1 << 23  # above the largest id of a process


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder of a cluster whose Ray has ended."""
    with tempfile.TemporaryDirectory(prefix="r-") as name:
        ClusterState("http://127.0.0.1:1", "127.0.0.1:2", "http://127.0.0.1:3", NO_PROCESS, "then", name).write()
        yield Path(name)


class FailingCluster(LocalCluster):
    """Its restarts raise these errors, one after the other. Then one succeeds, and the cluster is stopped."""

    def __init__(self, folder: Path, errors: list[Exception]) -> None:
        super().__init__(folder)
        self.errors = errors
        self.proven: list[bool] = []

    def restart(self, timeout_s: float = 180.0, *, proven: bool = False) -> ClusterState:
        self.proven.append(proven)
        if self.errors:
            raise self.errors.pop(0)
        state = self.state
        OwnFolder(self.temp_dir).write(STOPPING_FILE, "")
        return state

    @property
    def state(self) -> ClusterState:
        return ClusterState("", "", "", NO_PROCESS, "then", str(self.temp_dir))


def test_it_gives_up_after_the_last_attempt_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration of the cluster is gone."""
    said: list[str] = []
    assert Supervisor(LocalCluster(folder), said.append, 1.0, (0.0, 0.0)).run() == 1
    assert [line.partition(":")[0] for line in said] == [
        "Ray ended unexpectedly", "attempt 1 of 2 to start Ray again, in 0 s", "Ray was not started",
        "attempt 2 of 2 to start Ray again, in 0 s", "Ray was not started", "gave up; `ranklet up` starts Ray again",
    ]  # fmt: skip
    assert cli.main(["status", "--temp-dir", str(folder)]) == 1
    assert "gave up" in capsys.readouterr().out


def test_a_configuration_that_does_not_start_is_replaced_by_the_last_that_did(folder: Path) -> None:
    """Only then: a Ray that does not start says nothing about the configuration."""
    cluster = FailingCluster(folder, [ClusterError("no Ray"), DeploymentFailed("no model"), ClusterError("no Ray")])
    assert Supervisor(cluster, lambda line: None, 1.0, [0.0] * 9).run() == 0
    assert cluster.proven == [False, False, True, True]


def test_a_command_that_stops_the_cluster_ends_the_wait_for_the_next_attempt(folder: Path) -> None:
    cluster = FailingCluster(folder, [])

    def stop(line: str) -> None:
        if line.startswith("attempt"):
            OwnFolder(folder).write(STOPPING_FILE, "")

    assert Supervisor(cluster, stop, 1.0, (3600.0,)).run() == 0
    assert cluster.proven == []
    assert read_supervisor(folder) is None


def test_a_start_is_refused_while_a_supervisor_starts_the_cluster_again(folder: Path, tmp_path: Path) -> None:
    SupervisorState(os.getpid(), process_start_time(os.getpid()) or "", said="attempt 1").write(folder)
    with pytest.raises(ClusterError, match="attempt 1; `ranklet down` stops the supervisor"):
        LocalCluster(folder).start(tmp_path / "any.yaml")
