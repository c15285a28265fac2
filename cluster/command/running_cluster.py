"""A cluster of `ranklet up` that runs on this machine: its state, and changes of its configuration."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ranklet.cluster.command.causes import last_cause
from ranklet.cluster.command.cluster_state import ClusterState, find_cluster, ray_dir
from ranklet.cluster.command.deployment_file import drain_time_s, read_configuration, with_open_admin
from ranklet.cluster.command.json_client import fetch_json
from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.ray_head import STOPPING_FILE, read_token
from ranklet.cluster.command.requirements import missing_resources
from ranklet.cluster.command.serve_api import DeployRefused, ServeApi
from ranklet.cluster.command.serve_status import ServeStatus

RAY_LOG_FILE = "ray-start.log"
CONFIG_FILE = "config.yaml"
POLL_S = 0.2
_HTTP_TIMEOUT_S = 10.0


class ClusterError(Exception):
    """The local cluster failed to start, deploy or stop. The message says why, and where the logs are."""


class DeploymentFailed(ClusterError):  # noqa: N818  # it is no fault of this program
    """Ray runs, but the deployments of the configuration do not start."""


class RunningCluster:
    """A cluster, whichever process started it.

    Args:
        temp_dir: its folder.
        directory: Relative paths of a configuration start here. None is the current folder.
        report: Called with one line per step.
    """

    def __init__(
        self, temp_dir: Path, *, directory: Path | None = None, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.temp_dir = temp_dir
        self._folder = OwnFolder(temp_dir)
        self._directory = (directory or Path.cwd()).absolute()
        self._report = report
        self._state: ClusterState | None = None

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

    def _wait_until_ready(self, deadline_s: float, timeout_s: float) -> None:
        while True:
            status = self.status()
            if failure := status.failure:
                raise DeploymentFailed(f"the deployment failed: {failure}. {self._logs()}")
            if status.is_running and self.is_ready():
                return
            self._check_ray()
            if time.monotonic() > deadline_s:
                reason = status.waits_for or "no replica answers"
                raise ClusterError(f"not ready after {timeout_s:g} s: {reason}. {self._logs()}")
            time.sleep(POLL_S)

    def _check_ray(self) -> None:
        if self.is_stopping:
            raise ClusterError("another command stops the cluster")
        if not self.state.is_running:
            cause = last_cause(self._folder.read(RAY_LOG_FILE))
            raise ClusterError(f"Ray ended while starting: {cause}. Its log is {self.temp_dir / RAY_LOG_FILE}")

    def _logs(self) -> str:
        return f"The logs are in {ray_dir(self.temp_dir) / 'session_latest' / 'logs' / 'serve'}"
