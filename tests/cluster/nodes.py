"""Further nodes of a cluster on this machine, each a `ray start` of its own that a test may kill."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.command.ray_head import SEVERAL_NODES_VARIABLE, script_path
from tests.cluster.service import Service, serving

# For the environment of a cluster to which further nodes are added.
SEVERAL_NODES = {SEVERAL_NODES_VARIABLE: "1"}
_ATTEMPTS = 3
_STARTED = "Ray runtime started"


class Node:
    """A node for replicas that need the resource `engine`, and for one gateway that needs `gateway`.

    The constructor returns when the node has joined.

    Ray may give up before the node has joined a busy machine's cluster, so there are several attempts.
    """

    def __init__(self, cluster: LocalCluster, log: Path, engines: int) -> None:
        command, environment = _node_command(cluster.state.address, engines), cluster.ray_environment
        for _ in range(_ATTEMPTS):
            with log.open("w") as output:
                self.process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            while self.process.poll() is None:
                if _STARTED in log.read_text(errors="replace"):
                    return
                time.sleep(0.1)
        raise AssertionError(f"no node joined in {_ATTEMPTS} attempts; last log:\n{log.read_text(errors='replace')}")

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Stop all processes of the node during the body, as on a machine that hangs. SIGKILL ends them after it."""
        try:
            for pid in list(process_tree(self.process.pid)):
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            self.kill()


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process during the body."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def serving_on_nodes(
    content: dict[str, Any], folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[Service, list[Node]]]:
    """Serve a configuration with HAProxy on the head, and two nodes with space for two replicas each.

    Args:
        environment: of the head, in addition to this process's.
    """
    started: list[Node] = []
    over = threading.Event()
    cluster = LocalCluster(http_port=0, report=print, environment={**environment, **SEVERAL_NODES})

    def join() -> None:
        """Serve waits for the nodes, and the nodes wait for Ray."""
        while not (cluster.is_alive and cluster.applications() is not None):
            if over.wait(0.1):
                return
        for number in range(2):
            started.append(Node(cluster, folder / f"node{number}.log", 2))

    joining = threading.Thread(target=join)
    joining.start()
    try:
        with serving(content, folder, cluster) as service:
            joining.join()
            assert len(started) == 2, "a node did not join: its error is above"
            yield service, started
    finally:
        over.set()
        joining.join()
        for node in started:
            if node.process.poll() is None:
                node.kill()


def _node_command(address: str, engines: int) -> list[str]:
    agent, agent_grpc, metrics, runtime_env = free_ports(4)
    return [
        script_path("ray"), "start", f"--address={address}", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--num-cpus=4", f"--resources={json.dumps({'engine': engines, 'gateway': 1})}",
        f"--object-store-memory={100 << 20}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime_env}",
    ]  # fmt: skip


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and its descendants."""
    for each in list(process_tree(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def process_tree(pid: int) -> Iterator[int]:
    """Yield the ids of a process and of its descendants."""
    yield pid
    for child in child_processes(pid):
        yield from process_tree(child)


def child_processes(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def engine_process(replica: int) -> int:
    """Return the id of the engine's process, which is a child of its replica's."""
    (found,) = (pid for pid in child_processes(replica) if "ranklet.replicas.process.worker" in command_line(pid))
    return found


def actor_process(service: Service, kind: str) -> int:
    """Return the process id of the only actor of a class on the head's node."""
    named = [pid for pid in process_tree(service.cluster.state.pid) if command_line(pid).startswith(f"ray::{kind}")]
    assert len(named) == 1
    return named[0]


def command_line(pid: int) -> str:
    """Return the command line or title of a process; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
