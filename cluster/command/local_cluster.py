"""A Ray cluster on this machine with the application deployed. Other clusters on the machine are not affected."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from ranklet.cluster.command.causes import last_cause
from ranklet.cluster.command.cluster_state import STATE_FILE, ClusterState, find_cluster, ray_dir
from ranklet.cluster.command.deployment_file import drain_time_s, http_host, read_configuration, with_open_admin
from ranklet.cluster.command.drain import wait_for_requests
from ranklet.cluster.command.json_client import fetch_json
from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.command.processes import process_start_time, terminate
from ranklet.cluster.command.ray_head import (
    MAX_TEMP_DIR_CHARACTERS,
    STOPPING_FILE,
    Proxy,
    RayHead,
    read_token,
    write_token,
)
from ranklet.cluster.command.requirements import missing_resources, port_problem
from ranklet.cluster.command.serve_api import DeployRefused, ServeApi
from ranklet.cluster.command.serve_status import ServeStatus
from ranklet.cluster.datapath import is_loopback

_LOG_FILE = "ray-start.log"
CONFIG_FILE = "config.yaml"
_POLL_S = 0.2
_HTTP_TIMEOUT_S = 10.0


class ClusterError(Exception):
    """The local cluster failed to start, deploy or stop. The message says why, and where the logs are."""


class LocalCluster:
    """Runs `ray start --head` and deploys. As a context manager, stops the processes that it started.

    Args:
        temp_dir: For ranklet's own files, and Ray's sessions and logs below it. No other user can read it. None creates
            a folder and removes it at the end.
        proxy: "haproxy", the fast data path, or "serve", Serve's own proxy.
        directory: Relative paths of the configuration start here. None is the current folder.
        http_port: Replaces the configuration's port. 0 selects a free one.
        report: Called with one line per step.
        environment: Additional variables for Ray's processes.

    Raises:
        ValueError: temp_dir is too long for the sockets that Ray creates below it.
    """

    def __init__(
        self, temp_dir: Path | None = None, *, proxy: Proxy = "haproxy", directory: Path | None = None,
        http_port: int | None = None, report: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._own_dir = temp_dir is None
        self.temp_dir = make_short_folder() if temp_dir is None else temp_dir.absolute()
        if len(str(self.temp_dir)) > MAX_TEMP_DIR_CHARACTERS:
            raise ValueError(
                f"--temp-dir: expected up to {MAX_TEMP_DIR_CHARACTERS} characters, because Ray creates sockets below "
                f"it; got {len(str(self.temp_dir))}: {self.temp_dir}. Choose a shorter path"
            )
        self._folder = OwnFolder(self.temp_dir)
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

    @property
    def is_stopping(self) -> bool:
        """Whether a command stops the cluster, or has stopped it."""
        return self._folder.has(STOPPING_FILE)

    def start(self, config: Path, timeout_s: float = 180.0) -> ClusterState:
        """Start Ray, deploy `config`, and wait until a replica answers.

        Raises:
            ClusterError: a cluster of this temp_dir is running already, or a step failed. A failed step leaves no
                process.
            ValueError: the configuration is unusable, or temp_dir belongs to another user.
            OSError: the configuration cannot be read, or temp_dir not be created.
        """
        running = find_cluster(self.temp_dir)
        if running is not None:
            raise ClusterError(
                f"a cluster runs at {running.base_url} (pid {running.pid}) already; `ranklet deploy` changes it, "
                "`ranklet down` stops it"
            )
        content = self._read(config)
        http = content["http_options"]
        if self._http_port is not None:
            http["port"] = self._http_port or free_ports(1)[0]
        if problem := port_problem(http_host(content), int(http["port"])):
            raise ClusterError(problem)
        try:
            deadline_s = time.monotonic() + timeout_s
            self._start_ray_with_retry(content, deadline_s)
            self._check_resources(content)
            self.deploy(content)
            self._wait_until_ready(deadline_s, timeout_s)
        except BaseException:
            self.stop(keep_logs=True)
            raise
        self._report(f"ready at {self.state.base_url}")
        return self.state

    def redeploy(self, config: Path, timeout_s: float = 180.0) -> ClusterState:
        """Deploy a changed configuration on the running cluster, and wait until it is healthy.

        Raises:
            ClusterError: no cluster is running, the configuration needs another start, or it did not become healthy.
            ValueError: the configuration is unusable.
            OSError: the configuration cannot be read.
        """
        state, content = self.state, self._read(config)
        deployed = yaml.safe_load(self._folder.read(CONFIG_FILE))
        if state.chosen_port:
            content["http_options"]["port"] = deployed["http_options"]["port"]
        for key in ("http_options", "proxy_location"):
            if content.get(key) != deployed.get(key):
                raise ClusterError(
                    f"{key}: a running cluster keeps what it was started with, {deployed.get(key)}; got "
                    f"{content.get(key)}. `ranklet down` and `ranklet up` change it"
                )
        self._check_resources(content)
        deadline_s = time.monotonic() + timeout_s
        self.deploy(content)
        self._wait_until_ready(deadline_s, timeout_s)
        self._report(f"healthy at {state.base_url}")
        return self.state

    def deploy(self, content: Mapping[str, Any]) -> None:
        """Deploy a configuration (parsed YAML). Returns when Ray has accepted it.

        Raises:
            ClusterError: Ray rejected it.
        """
        opened = with_open_admin(content)
        self._report("deploying")
        try:
            self._api().deploy(opened)
        except DeployRefused as error:
            raise ClusterError(f"Ray did not accept the configuration: {error}. {self._logs()}") from error
        self._folder.write(CONFIG_FILE, yaml.safe_dump(opened, sort_keys=False))
        self._state = replace(self.state, drain_s=drain_time_s(opened))
        self._state.write()

    def stop(self, *, keep_logs: bool = False, drain: bool = False) -> None:
        """Stop the cluster of this temp_dir, whichever process started it. Does nothing if none is running.

        Args:
            drain: first refuse new requests, and let those in flight end, for up to `graceful_shutdown_timeout_s`.
        """
        state = find_cluster(self.temp_dir) or self._state  # another process may have deployed since
        if state is not None:
            try:
                self._folder.write(STOPPING_FILE, "")
                if drain:
                    wait_for_requests(state.base_url, state.drain_s, self._report, lambda: state.is_running)
            finally:
                self._report("stopping Ray")
                terminate(state.pid, state.start_time)
        if self._process is not None:
            self._process.wait()  # collects the process if `terminate` did not
        self._state = None
        self._folder.remove(STATE_FILE)
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
        return self._api().applications()

    def status(self) -> ServeStatus:
        return ServeStatus(self.applications())

    def is_ready(self) -> bool:
        """Whether a replica can compute."""
        with contextlib.suppress(OSError, ValueError):
            return fetch_json(f"{self.state.base_url}/ready", timeout_s=_HTTP_TIMEOUT_S) is not None
        return False

    @property
    def config_file(self) -> Path:
        """The file of the last deployed configuration."""
        return self.temp_dir / CONFIG_FILE

    def _api(self) -> ServeApi:
        return ServeApi(self.state.dashboard, read_token(self.temp_dir))

    def _read(self, config: Path) -> dict[str, Any]:
        return read_configuration(config, self._directory, self._report)

    def _check_resources(self, content: Mapping[str, Any]) -> None:
        available = self._api().resources()
        missing = [] if available is None else missing_resources(content, available)
        if missing:
            raise ClusterError("; ".join(missing))

    def _start_ray_with_retry(self, content: Mapping[str, Any], deadline_s: float) -> None:
        """Start Ray, with a second attempt: Ray gives its own processes 30 s, which a busy machine can exceed."""
        try:
            self._start_ray(content, deadline_s)
        except ClusterError as error:
            self._report(f"Ray did not start; trying once more. {error}")
            self.stop(keep_logs=True)
            self._start_ray(content, deadline_s)

    def _start_ray(self, content: Mapping[str, Any], deadline_s: float) -> None:
        self._report(f"starting Ray with {'HAProxy' if self._proxy == 'haproxy' else 'its own HTTP proxy'}")
        self._folder.create()
        self._folder.remove(STOPPING_FILE)
        write_token(self.temp_dir)
        head = self._head = RayHead.with_free_ports(
            self.temp_dir, self._proxy, on_loopback=is_loopback(http_host(content))
        )
        with self._folder.write(_LOG_FILE, "").open("w") as log:
            self._process = subprocess.Popen(
                head.head_command(), cwd=self._directory, env=head.environment(self._environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        pid, http_port = self._process.pid, content["http_options"]["port"]
        self._state = ClusterState(
            f"http://{_reachable(http_host(content))}:{http_port}", head.address, head.dashboard,
            pid, process_start_time(pid) or "", str(self.temp_dir), drain_time_s(content), self._http_port is not None,
        )  # fmt: skip
        self._state.write()
        self._wait("Ray's dashboard", lambda: self.applications() is not None, deadline_s)

    def _wait_until_ready(self, deadline_s: float, timeout_s: float) -> None:
        while True:
            status = self.status()
            if failure := status.failure:
                raise ClusterError(f"the deployment failed: {failure}. {self._logs()}")
            if status.is_running and self.is_ready():
                return
            self._check_ray()
            if time.monotonic() > deadline_s:
                reason = status.waits_for or "no replica answers"
                raise ClusterError(f"not ready after {timeout_s:g} s: {reason}. {self._logs()}")
            time.sleep(_POLL_S)

    def _wait(self, awaited: str, has_happened: Callable[[], bool], deadline_s: float) -> None:
        while not has_happened():
            self._check_ray()
            if time.monotonic() > deadline_s:
                raise ClusterError(f"timed out waiting for {awaited}. {self._logs()}")
            time.sleep(_POLL_S)

    def _check_ray(self) -> None:
        if not self.state.is_running:
            cause = last_cause(self._folder.read(_LOG_FILE))
            raise ClusterError(f"Ray ended while starting: {cause}. Its log is {self.temp_dir / _LOG_FILE}")

    def _logs(self) -> str:
        return f"The logs are in {ray_dir(self.temp_dir) / 'session_latest' / 'logs' / 'serve'}"


def make_short_folder() -> Path:
    """Create a folder of this user in the system's temporary folder, or in /tmp if that one's path is too long."""
    folder = tempfile.mkdtemp(prefix="ranklet-")
    if len(folder) > MAX_TEMP_DIR_CHARACTERS:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="ranklet-", dir="/tmp")
    return Path(folder)


def _reachable(host: str) -> str:
    """Return the host at which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
