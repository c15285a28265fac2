"""A Ray cluster on this machine with the application deployed. Other clusters on the machine are not affected."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from ranklet.cluster.command.cluster_state import STATE_FILE, ClusterState, find_cluster
from ranklet.cluster.command.deployment_file import read_configuration, with_open_admin
from ranklet.cluster.command.json_client import fetch_json
from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.command.processes import process_start_time, terminate
from ranklet.cluster.command.ray_head import Proxy, RayHead, auth_environment, read_token, script_path, write_token

_LOG_FILE = "ray-start.log"
_MAX_TEMP_DIR_CHARACTERS = 40  # Ray creates sockets below it, and a socket's path may have 107 characters
_LOG_TAIL_CHARACTERS = 4000
_POLL_S = 0.2
_HTTP_TIMEOUT_S = 10.0


class ClusterError(Exception):
    """The local cluster failed to start, deploy or stop. The message ends with Ray's own output."""


class LocalCluster:
    """Runs `ray start --head` and `serve deploy`. As a context manager, stops the processes that it started.

    Args:
        temp_dir: For Ray's sessions and logs, up to 40 characters. None creates a folder and removes it at the end.
        proxy: "haproxy", the fast data path, or "serve", Serve's own proxy.
        directory: Relative paths of the configuration start here. None is the current folder.
        http_port: Replaces the configuration's port. 0 selects a free one.
        report: Called with one line per step.
        environment: Additional variables for Ray's processes.

    Raises:
        ValueError: temp_dir is too long.
    """

    def __init__(
        self, temp_dir: Path | None = None, *, proxy: Proxy = "haproxy", directory: Path | None = None,
        http_port: int | None = None, report: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._own_dir = temp_dir is None
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ranklet-")) if temp_dir is None else temp_dir.absolute()
        if len(str(self.temp_dir)) > _MAX_TEMP_DIR_CHARACTERS:
            raise ValueError(
                f"temp_dir: expected up to {_MAX_TEMP_DIR_CHARACTERS} characters, got {self.temp_dir}. "
                "Choose a shorter path"
            )
        self._proxy: Proxy = proxy
        self._directory = (directory or Path.cwd()).absolute()
        self._http_port = http_port
        self._report = report
        self._environment = dict(environment or {})
        self._state: ClusterState | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._head: RayHead | None = None

    @property
    def state(self) -> ClusterState:
        """Addresses of the running cluster. Raises ClusterError if it is not running."""
        state = self._state or find_cluster(self.temp_dir)
        if state is None:
            raise ClusterError(f"no cluster of {self.temp_dir} is running; `ranklet up` starts one")
        return state

    @property
    def is_alive(self) -> bool:
        """Whether the process of `ray start` exists."""
        return find_cluster(self.temp_dir) is not None

    def start(self, config: Path, timeout_s: float = 180.0) -> ClusterState:
        """Start Ray, deploy `config`, and wait until a replica answers.

        Raises:
            ClusterError: a cluster of this temp_dir is running already, or a step failed. A failed step leaves no
                process.
            ValueError: the configuration is unusable.
            OSError: the configuration cannot be read.
        """
        running = find_cluster(self.temp_dir)
        if running is not None:
            raise ClusterError(
                f"a cluster runs at {running.base_url} (pid {running.pid}) already; `ranklet down` stops it"
            )
        content = read_configuration(config)
        if self._http_port is not None:
            content["http_options"]["port"] = self._http_port or free_ports(1)[0]
        try:
            deadline_s = time.monotonic() + timeout_s
            self._start_ray_with_retry(content["http_options"]["port"], deadline_s)
            self.deploy(content)
            self._wait("the application", self._is_running, deadline_s)
            self._wait("an answer of a replica", self._is_ready, deadline_s)
        except BaseException:
            self.stop(keep_logs=True)
            raise
        self._report(f"ready at {self.state.base_url}")
        return self.state

    def deploy(self, content: Mapping[str, Any]) -> None:
        """Run `serve deploy` with a configuration (parsed YAML). Returns when Ray has accepted it.

        Raises:
            ClusterError: Ray rejected it.
        """
        path = self.temp_dir / "config.yaml"
        path.write_text(yaml.safe_dump(with_open_admin(content), sort_keys=False))
        self._report("serve deploy")
        command = [script_path("serve"), "deploy", "-a", self.state.dashboard, str(path)]
        env = {**os.environ, **auth_environment(self.temp_dir), **self._environment}
        done = subprocess.run(command, cwd=self._directory, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"serve deploy failed:\n{(done.stdout + done.stderr)[-_LOG_TAIL_CHARACTERS:]}")

    def stop(self, *, keep_logs: bool = False) -> None:
        """Stop the cluster of this temp_dir, whichever process started it. Does nothing if none is running."""
        state = self._state or find_cluster(self.temp_dir)
        if state is not None:
            self._report("stopping Ray")
            terminate(state.pid, state.start_time)
        if self._process is not None:
            self._process.wait()  # collects the process if `terminate` did not
        self._state = None
        (self.temp_dir / STATE_FILE).unlink(missing_ok=True)
        if self._own_dir and not keep_logs:
            shutil.rmtree(self.temp_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state is not None or self._own_dir:  # else another process may have started the cluster of temp_dir
            self.stop(keep_logs=error is not None)

    @property
    def ray_environment(self) -> dict[str, str]:
        """Environment of the Ray processes that this object started. A further node needs it too."""
        if self._head is None:
            raise ClusterError("expected a cluster that this object has started; call `start` first")
        return self._head.environment(self._environment)

    def applications(self) -> dict[str, Any] | None:
        """Return Serve's applications by name, from its REST API; None while it does not answer."""
        answer = _fetch(f"{self.state.dashboard}/api/serve/applications/", read_token(self.temp_dir))
        return None if answer is None else dict(answer["applications"])

    def _start_ray_with_retry(self, http_port: int, deadline_s: float) -> None:
        """Start Ray, with a second attempt: Ray gives its own processes 30 s, which a busy machine can exceed."""
        try:
            self._start_ray(http_port, deadline_s)
        except ClusterError:
            self._report("Ray did not start; trying once more")
            self.stop(keep_logs=True)
            self._start_ray(http_port, deadline_s)

    def _start_ray(self, http_port: int, deadline_s: float) -> None:
        self._report(f"starting Ray with {'HAProxy' if self._proxy == 'haproxy' else 'its own HTTP proxy'}")
        self.temp_dir.mkdir(parents=True, exist_ok=True)
        write_token(self.temp_dir)
        head = self._head = RayHead.with_free_ports(self.temp_dir, self._proxy)
        with (self.temp_dir / _LOG_FILE).open("w") as log:
            self._process = subprocess.Popen(
                head.head_command(), cwd=self._directory, env=head.environment(self._environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        pid = self._process.pid
        self._state = ClusterState(
            f"http://127.0.0.1:{http_port}", head.address, head.dashboard,
            pid, process_start_time(pid) or "", str(self.temp_dir),
        )  # fmt: skip
        self._state.write()
        self._wait("Ray's dashboard", lambda: self.applications() is not None, deadline_s)

    def _is_running(self) -> bool:
        """Raises ClusterError if an application failed to deploy."""
        applications = (self.applications() or {}).values()
        for application in applications:
            if application["status"] == "DEPLOY_FAILED":
                raise ClusterError(f"deployment failed:\n{application['message'][-_LOG_TAIL_CHARACTERS:]}")
        return bool(applications) and all(application["status"] == "RUNNING" for application in applications)

    def _is_ready(self) -> bool:
        return _fetch(f"{self.state.base_url}/ready") is not None

    def _wait(self, awaited: str, has_happened: Callable[[], bool], deadline_s: float) -> None:
        while not has_happened():
            if not self.state.is_running:
                raise ClusterError(f"Ray ended while starting:\n{self._log_tail()}")
            if time.monotonic() > deadline_s:
                raise ClusterError(f"timed out waiting for {awaited}. Logs: {self.temp_dir}\n{self._log_tail()}")
            time.sleep(_POLL_S)

    def _log_tail(self) -> str:
        return (self.temp_dir / _LOG_FILE).read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]


def _fetch(url: str, token: str | None = None) -> Any:
    """Return the JSON of a 200 answer, else None."""
    with contextlib.suppress(OSError, ValueError):
        return fetch_json(url, timeout_s=_HTTP_TIMEOUT_S, token=token)
    return None
