"""A Ray cluster of this machine alone, with the application on it. Other clusters are not touched."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.command.processes import process_start_time, terminate
from ranklet.cluster.command.ray_head import Proxy, RayHead, auth_environment, read_token, script_path, write_token

STATE_FILE = "ranklet.json"
_LOG_FILE = "ray-start.log"
_MAX_TEMP_DIR_CHARACTERS = 40  # Ray puts sockets below it, whose paths may have 107 characters
_LOG_TAIL_CHARACTERS = 4000
_POLL_S = 0.2


class ClusterError(Exception):
    """The local cluster could not do as asked; the message ends with what Ray said."""


@dataclass(frozen=True)
class ClusterState:
    """A running local cluster, as its state file says."""

    base_url: str  # of the HTTP API
    address: str  # of Ray, for ray.init
    dashboard: str  # for `serve -a`
    pid: int  # of `ray start --block`
    start_time: str  # tells that process from a later one with its id
    temp_dir: str


class LocalCluster:
    """`ray start --head` and `serve deploy` as a context manager; `stop` ends the processes that `start` started.

    Args:
        temp_dir: for Ray's sessions and logs, at most 40 characters long; None makes one and removes it at the end.
        proxy: "haproxy", the fast data path, or "serve", Serve's own proxy.
        directory: where relative paths of the configuration start; None is the current one.
        http_port: replaces the configuration's; 0 means any free port.
        report: is told each step.
        environment: more variables for Ray's processes.

    Raises:
        ValueError: temp_dir is too long.
    """

    def __init__(
        self,
        temp_dir: Path | None = None,
        *,
        proxy: Proxy = "haproxy",
        directory: Path | None = None,
        http_port: int | None = None,
        report: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._own_dir = temp_dir is None
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ranklet-")) if temp_dir is None else temp_dir.absolute()
        if len(str(self.temp_dir)) > _MAX_TEMP_DIR_CHARACTERS:
            raise ValueError(
                f"temp_dir: expected at most {_MAX_TEMP_DIR_CHARACTERS} characters, got {self.temp_dir}. "
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
        """Addresses of the running cluster.

        Raises:
            ClusterError: it is not running.
        """
        state = self._state or find_cluster(self.temp_dir)
        if state is None:
            raise ClusterError(f"no cluster of {self.temp_dir} is running; `ranklet up` starts one")
        return state

    @property
    def is_up(self) -> bool:
        """Whether Ray runs, be the application deployed or not."""
        return self._state is not None and self.applications() is not None

    @property
    def is_alive(self) -> bool:
        """Whether the process of `ray start` is there."""
        return find_cluster(self.temp_dir) is not None

    def start(self, config: Path, timeout_s: float = 180.0) -> ClusterState:
        """Start Ray, deploy `config`, and wait until it answers.

        Raises:
            ClusterError: a cluster of this temp_dir is running already, or a step failed; then nothing is left running.
        """
        running = find_cluster(self.temp_dir)
        if running is not None:
            raise ClusterError(
                f"a cluster runs at {running.base_url} (pid {running.pid}) already; `ranklet down` stops it"
            )
        content = self._configuration(config)
        try:
            deadline_s = time.monotonic() + timeout_s
            self._start_ray_with_retry(content["http_options"]["port"], deadline_s)
            self.deploy(content)
            self._wait("the application", self._is_running, deadline_s)
            self._wait("an answer of a replica", lambda: _get(f"{self.state.base_url}/ready") is not None, deadline_s)
        except BaseException:
            self.stop(keep_logs=True)
            raise
        self._report(f"ready at {self.state.base_url}")
        return self.state

    def deploy(self, content: Mapping[str, Any]) -> None:
        """`serve deploy` of a configuration (parsed YAML); returns when Ray has accepted it.

        Raises:
            ClusterError: Ray refused it.
        """
        path = self.temp_dir / "config.yaml"
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
        self._report("serve deploy")
        command = [script_path("serve"), "deploy", "-a", self.state.dashboard, str(path)]
        env = {**os.environ, **auth_environment(self.temp_dir), **self._environment}
        done = subprocess.run(command, cwd=self._directory, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"serve deploy failed:\n{(done.stdout + done.stderr)[-_LOG_TAIL_CHARACTERS:]}")

    def stop(self, *, keep_logs: bool = False) -> None:
        """End every process of this cluster; harmless when there is none."""
        state = self._state or find_cluster(self.temp_dir)
        if state is not None:
            self._report("stopping Ray")
            terminate(state.pid, state.start_time)
        if self._process is not None:
            self._process.wait()  # collects the exit status, if `end` has not
        self._state = None
        (self.temp_dir / STATE_FILE).unlink(missing_ok=True)
        if self._own_dir and not keep_logs:
            shutil.rmtree(self.temp_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(keep_logs=error is not None)

    def _configuration(self, config: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = yaml.safe_load(config.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{config}: expected YAML, got: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{config}: expected a map like deploy/local.yaml's, got {type(content).__name__}")
        http = content.setdefault("http_options", {})
        http.setdefault("port", 8000)
        if self._http_port is not None:
            http["port"] = self._http_port or free_ports(1)[0]
        return content

    def _start_ray_with_retry(self, http_port: int, deadline_s: float) -> None:
        """Ray gives its own processes 30 s to come up, too little on a machine that is busy for the moment."""
        try:
            self._start_ray(http_port, deadline_s)
        except ClusterError:
            self._report("Ray did not come up; trying once more")
            self.stop(keep_logs=True)
            self._start_ray(http_port, deadline_s)

    def _start_ray(self, http_port: int, deadline_s: float) -> None:
        self._report(f"starting Ray, {'HAProxy' if self._proxy == 'haproxy' else 'its own proxy'} in front")
        self.temp_dir.mkdir(parents=True, exist_ok=True)
        write_token(self.temp_dir)
        head = self._head = RayHead.with_free_ports(self.temp_dir, self._proxy)
        with (self.temp_dir / _LOG_FILE).open("w") as log:
            self._process = subprocess.Popen(
                head.head_command(), cwd=self._directory, env=head.environment(self._environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        base_url = f"http://127.0.0.1:{http_port}"
        start_time = process_start_time(self._process.pid) or ""
        self._state = ClusterState(
            base_url, head.address, head.dashboard, self._process.pid, start_time, str(self.temp_dir)
        )
        (self.temp_dir / STATE_FILE).write_text(json.dumps(asdict(self._state)))
        self._wait("Ray's dashboard", lambda: self.applications() is not None, deadline_s)

    def node_command(self, resources: Mapping[str, float], num_cpus: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of one more node on this machine, for tests of what happens when it is lost.

        Raises:
            ClusterError: this object has not started the cluster.
        """
        if self._head is None:
            raise ClusterError("expected a cluster started here; `start` it first")
        return self._head.node_command(resources, num_cpus), self._head.environment(self._environment)

    def applications(self) -> dict[str, Any] | None:
        """Serve's applications as its REST API tells them, by name; None while it does not answer."""
        said = _get(f"{self.state.dashboard}/api/serve/applications/", read_token(self.temp_dir))
        return None if said is None else dict(said["applications"])

    def _is_running(self) -> bool:
        """Raises ClusterError when an application has failed to deploy."""
        applications = (self.applications() or {}).values()
        for application in applications:
            if application["status"] == "DEPLOY_FAILED":
                raise ClusterError(f"deployment failed:\n{application['message'][-_LOG_TAIL_CHARACTERS:]}")
        return bool(applications) and all(application["status"] == "RUNNING" for application in applications)

    def _wait(self, what: str, happened: Callable[[], bool], deadline_s: float) -> None:
        while not happened():
            state = self.state
            if process_start_time(state.pid) != state.start_time:
                raise ClusterError(f"Ray ended while starting:\n{self._log()}")
            if time.monotonic() > deadline_s:
                raise ClusterError(f"expected {what} in time, got none. Logs: {self.temp_dir}\n{self._log()}")
            time.sleep(_POLL_S)

    def _log(self) -> str:
        return (self.temp_dir / _LOG_FILE).read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]


def find_cluster(temp_dir: Path) -> ClusterState | None:
    """The cluster that runs under `temp_dir`, if one does."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        state = ClusterState(**json.loads((temp_dir / STATE_FILE).read_text()))
        if process_start_time(state.pid) == state.start_time:
            return state
    return None


def _get(url: str, bearer: str | None = None) -> Any:
    """JSON of a 200 answer, else None. Never through a proxy: all of it is on this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
    try:
        with direct.open(request, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError, urllib.error.URLError):
        return None
