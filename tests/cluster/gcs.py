"""Ray's GCS, the service with the cluster's state, and a Redis server that keeps this state while the GCS is down."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ranklet.cluster.command.ports import free_ports
from tests.cluster.nodes import command_line, process_tree


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Redis server. Yields the environment variables with which Ray uses it."""
    (port,) = free_ports(1)
    command = ["redis-server", f"--port {port}", "--bind 127.0.0.1", "--save", "", f"--dir {folder}"]
    with (folder / "redis.log").open("w") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait()


class Gcs:
    """The GCS of a cluster on this machine.

    `ray start --block` ends a head that loses its GCS. This object starts another GCS, so it pauses `ray start` first.

    Args:
        ray: Process id of `ray start`.
    """

    def __init__(self, ray: int, log: Path) -> None:
        self._ray, self._log = ray, log
        (self._pid,) = (pid for pid in process_tree(ray) if command_line(pid).partition(" ")[0].endswith("/gcs_server"))
        self._second: subprocess.Popen[bytes] | None = None

    def kill_and_restart(self, down_s: float) -> None:
        """Send SIGKILL, and start a GCS with the same arguments and environment after `down_s` seconds."""
        process = Path(f"/proc/{self._pid}")
        command = process.joinpath("cmdline").read_bytes().split(b"\0")[:-1]
        lines = process.joinpath("environ").read_bytes().split(b"\0")
        environment = dict(line.split(b"=", 1) for line in lines if b"=" in line)
        folder = process.joinpath("cwd").readlink()
        os.kill(self._ray, signal.SIGSTOP)
        os.kill(self._pid, signal.SIGKILL)
        time.sleep(down_s)
        with self._log.open("w") as log:
            self._second = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def close(self) -> None:
        """Kill all processes of the head at once. Otherwise some would wait for others that have ended."""
        if self._second is not None:
            self._second.kill()
            self._second.wait()
        for pid in list(process_tree(self._ray)):
            if pid != self._ray:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os.kill(self._ray, signal.SIGCONT)
