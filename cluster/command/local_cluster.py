"""A Ray cluster on this machine with the application deployed. Other clusters on the machine are not affected."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ranklet.cluster.command.cluster_state import STATE_FILE, ClusterState, find_cluster, read_state
from ranklet.cluster.command.deployment_file import base_url, drain_time_s, http_host
from ranklet.cluster.command.drain import wait_for_requests
from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.command.processes import kill_session, process_start_time, terminate
from ranklet.cluster.command.ray_head import (
    MAX_TEMP_DIR_CHARACTERS,
    STOPPING_FILE,
    Proxy,
    RayHead,
    make_short_folder,
    write_token,
)
from ranklet.cluster.command.requirements import port_problem
from ranklet.cluster.command.running_cluster import CONFIG_FILE, POLL_S, RAY_LOG_FILE, ClusterError, RunningCluster
from ranklet.cluster.command.supervisor_state import find_supervisor
from ranklet.cluster.datapath import DRAIN_IS_OVER, is_loopback

_ERRORS_S = 5.0  # for gateways to end their requests with an error
_STARTED_FILE = "started.yaml"  # the last configuration with which a start succeeded


class LocalCluster(RunningCluster):
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
        folder = make_short_folder() if temp_dir is None else temp_dir.absolute()
        if len(str(folder)) > MAX_TEMP_DIR_CHARACTERS:
            raise ValueError(
                f"--temp-dir: expected up to {MAX_TEMP_DIR_CHARACTERS} characters, because Ray creates sockets below "
                f"it; got {len(str(folder))}: {folder}. Choose a shorter path"
            )
        super().__init__(folder, directory=directory, report=report)
        self._proxy: Proxy = proxy
        self._http_port = http_port
        self._has_chosen_port = http_port is not None
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._head: RayHead | None = None

    def start(self, config: Path, timeout_s: float = 180.0) -> ClusterState:
        """Start Ray, deploy `config`, and wait until a replica answers.

        Raises:
            ClusterError: a cluster of this temp_dir is running already, or a step failed. A failed step leaves no
                process.
            ValueError: the configuration is unusable, or temp_dir belongs to another user.
            OSError: the configuration cannot be read, or temp_dir not be created.
        """
        running, supervisor = find_cluster(self.temp_dir), find_supervisor(self.temp_dir)
        if running is not None:
            raise ClusterError(
                f"a cluster runs at {running.base_url} (pid {running.pid}) already; `ranklet deploy` changes it, "
                "`ranklet down` stops it"
            )
        if supervisor is not None:
            raise ClusterError(f"{supervisor.said}; `ranklet down` stops the supervisor, process {supervisor.pid}")
        content = self._read(config)
        if self._http_port is not None:
            content["http_options"]["port"] = self._http_port or free_ports(1)[0]
        self._folder.create()
        self._folder.remove(STOPPING_FILE)
        return self._start(content, timeout_s)

    def restart(self, timeout_s: float = 180.0, *, proven: bool = False) -> ClusterState:
        """Start Ray again after it was lost, with the configuration that was deployed last.

        Args:
            proven: take the last configuration with which a start succeeded.

        Raises:
            DeploymentFailed: Ray runs, but the configuration cannot be deployed.
            ClusterError: a step failed, or a command stops the cluster. No process is left.
            ValueError: the configuration is unusable.
            OSError: the configuration cannot be read.
        """
        lost = self._state or read_state(self.temp_dir)
        if lost is not None:
            self._has_chosen_port = lost.chosen_port
            self._end(lost, grace_s=0.0)
        return self._start(self._read(self.temp_dir / (_STARTED_FILE if proven else CONFIG_FILE)), timeout_s)

    def _start(self, content: dict[str, Any], timeout_s: float) -> ClusterState:
        if problem := port_problem(http_host(content), int(content["http_options"]["port"])):
            raise ClusterError(problem)
        try:
            deadline_s = time.monotonic() + timeout_s
            self._start_ray_with_retry(content, deadline_s)
            self._check_resources(content)
            self.deploy(content)
            self._wait_until_ready(deadline_s, timeout_s)
        except BaseException:
            self._end(self._state)
            raise
        self._folder.write(_STARTED_FILE, self._folder.read(CONFIG_FILE))
        self._report(f"ready at {self.state.base_url}")
        return self.state

    def stop(self, *, keep_logs: bool = False, drain: bool = False, now: bool = False) -> None:
        """Stop the cluster of this temp_dir, whichever process started it. Does nothing if none is running.

        Args:
            drain: first refuse new requests, and let those in flight end, for up to `graceful_shutdown_timeout_s`. Then
                those that are left end with an error.
            now: with `drain`, all requests in flight end with an error.
        """
        state = find_cluster(self.temp_dir) or self._state  # another process may have deployed since
        supervisor = find_supervisor(self.temp_dir)
        if state is not None or supervisor is not None:
            try:
                self._folder.write(STOPPING_FILE, "")  # from now on, the supervisor does not start Ray
                if drain and state is not None:
                    self._drain(state, now=now)
            finally:
                self._report("stopping Ray")
                self._end(state)
        if supervisor is not None and supervisor.pid != os.getpid():
            supervisor.end()
            self._end(find_cluster(self.temp_dir))  # it may have been starting Ray
        if self._own_dir and not keep_logs:
            shutil.rmtree(self.temp_dir, ignore_errors=True)

    def _drain(self, state: ClusterState, *, now: bool) -> None:
        have_ended = False
        try:
            if not now:
                have_ended = wait_for_requests(state.base_url, state.drain_s, self._report, lambda: state.is_running)
        finally:  # also after a signal
            if not have_ended:
                self._folder.write(STOPPING_FILE, DRAIN_IS_OVER)
                wait_for_requests(state.base_url, _ERRORS_S, lambda line: None, lambda: state.is_running)

    def _end(self, state: ClusterState | None, grace_s: float = 20.0) -> None:
        """End all processes of a head, which may have ended itself."""
        if state is not None:
            terminate(state.pid, state.start_time, grace_s)
            kill_session(state.pid)
        if self._process is not None:
            self._process.wait()  # collects the process if `terminate` did not
        self._state = None
        self._folder.remove(STATE_FILE)

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

    def _start_ray_with_retry(self, content: Mapping[str, Any], deadline_s: float) -> None:
        """Start Ray, with a second attempt: Ray gives its own processes 30 s, which a busy machine can exceed."""
        try:
            self._start_ray(content, deadline_s)
        except ClusterError as error:
            if self.is_stopping:
                raise
            self._report(f"Ray did not start; trying once more. {error}")
            self._end(self._state)
            self._start_ray(content, deadline_s)

    def _start_ray(self, content: Mapping[str, Any], deadline_s: float) -> None:
        self._report(f"starting Ray with {'HAProxy' if self._proxy == 'haproxy' else 'its own HTTP proxy'}")
        write_token(self.temp_dir)
        head = self._head = RayHead.with_free_ports(
            self.temp_dir, self._proxy, on_loopback=is_loopback(http_host(content))
        )
        with self._folder.write(RAY_LOG_FILE, "").open("w") as log:
            self._process = subprocess.Popen(
                head.head_command(), cwd=self._directory, env=head.environment(self._environment),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        pid = self._process.pid
        self._state = ClusterState(
            base_url(content), head.address, head.dashboard,
            pid, process_start_time(pid) or "", str(self.temp_dir), drain_time_s(content), self._has_chosen_port,
        )  # fmt: skip
        self._state.write()
        self._wait("Ray's dashboard", lambda: self.applications() is not None, deadline_s)

    def _wait(self, awaited: str, has_happened: Callable[[], bool], deadline_s: float) -> None:
        while not has_happened():
            self._check_ray()
            if time.monotonic() > deadline_s:
                raise ClusterError(f"timed out waiting for {awaited}. {self._logs()}")
            time.sleep(POLL_S)
