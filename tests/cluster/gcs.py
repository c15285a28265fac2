"""Ray's GCS, the service that knows the cluster, with what it knows in a Redis beside it, so that it may be lost."""

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
    """A Redis server; what Ray needs in its environment to use it."""
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

    `ray start --block` ends a head that loses its GCS, as nobody would start another; here somebody does, so it is
    stopped from then on.

    Args:
        ray: process id of `ray start`.
    """

    def __init__(self, ray: int, log: Path) -> None:
        self._ray, self._log = ray, log
        (self._pid,) = (pid for pid in process_tree(ray) if command_line(pid).partition(" ")[0].endswith("/gcs_server"))
        self._another: subprocess.Popen[bytes] | None = None

    def kill_and_restart(self, seconds: float) -> None:
        """SIGKILL it, and start another, with the same words and environment, after a while."""
        process = Path(f"/proc/{self._pid}")
        command = process.joinpath("cmdline").read_bytes().split(b"\0")[:-1]
        lines = process.joinpath("environ").read_bytes().split(b"\0")
        environment = dict(line.split(b"=", 1) for line in lines if b"=" in line)
        folder = process.joinpath("cwd").readlink()
        os.kill(self._ray, signal.SIGSTOP)
        os.kill(self._pid, signal.SIGKILL)
        time.sleep(seconds)
        with self._log.open("w") as log:
            self._another = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def close(self) -> None:
        """End the head: all of its processes at once, or some would wait for others that are gone."""
        if self._another is not None:
            self._another.kill()
            self._another.wait()
        for pid in list(process_tree(self._ray)):
            if pid != self._ray:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os.kill(self._ray, signal.SIGCONT)
