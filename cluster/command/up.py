"""`ranklet up`, `deploy`, `status` and `down`: a cluster on this machine."""

import argparse
import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from ranklet.cluster.command.console import plain_lines
from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.cluster.command.processes import notify_systemd
from ranklet.cluster.command.ray_head import MAX_TEMP_DIR_CHARACTERS, auth_environment
from ranklet.cluster.command.supervisor import Supervisor, leave_supervisor
from ranklet.cluster.command.supervisor_state import find_supervisor, read_supervisor
from ranklet.cluster.command.user import user_name

_FILE_HELP = "a file such as deploy/local.yaml"


def add(commands: Any) -> None:
    up = commands.add_parser("up", help="start Ray on this machine, deploy a configuration, wait until it answers")
    up.add_argument("config", type=Path, metavar="CONFIG", help=_FILE_HELP)
    up.add_argument(
        "--proxy", choices=("haproxy", "serve"), default="haproxy", help="HTTP proxy (default: %(default)s)"
    )
    up.add_argument("--port", type=int, help="HTTP port in place of the configuration's; 0 selects a free port")
    up.add_argument(
        "--foreground", action="store_true",
        help="keep running instead of leaving a supervisor behind; SIGTERM or Ctrl-C stops Ray once requests in flight "
        "have ended; exit with 1 if Ray does not stay up",
    )  # fmt: skip
    up.set_defaults(run=_up)
    deploy = commands.add_parser(
        "deploy", help="deploy a changed configuration on the cluster of `ranklet up`, wait until it is healthy"
    )
    deploy.add_argument("config", type=Path, metavar="CONFIG", help=_FILE_HELP)
    deploy.set_defaults(run=_deploy)
    status = commands.add_parser("status", help="show the cluster of `ranklet up`; exit with 1 if it is not healthy")
    status.add_argument("--json", action="store_true", help="print Serve's whole status as JSON")
    status.set_defaults(run=_status)
    down = commands.add_parser("down", help="stop what `ranklet up` started")
    down.add_argument("--now", action="store_true", help="end the requests in flight with an error")
    down.set_defaults(run=_down)
    for command in (up, deploy):
        command.add_argument("--timeout-s", type=float, default=180.0, help="longest wait (default: %(default)s)")
    for command in (up, deploy, status, down):
        command.add_argument(
            "--temp-dir", type=Path, default=_default_temp_dir(),
            help="folder of the cluster, with Ray's sessions and logs in ray/; only this user can read it "
            "(default: %(default)s)",
        )  # fmt: skip


def _default_temp_dir() -> Path:
    """Return a folder in the system's temporary folder, or in /tmp where that path is too long for Ray's sockets."""
    name = f"ranklet-{user_name()}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(str(folder)) <= MAX_TEMP_DIR_CHARACTERS else Path("/tmp") / name


def _print(line: str) -> None:
    print(f"ranklet: {plain_lines(line)}", flush=True)


def _up(options: argparse.Namespace) -> int:
    cluster = LocalCluster(options.temp_dir, proxy=options.proxy, http_port=options.port, report=_print)
    if not options.foreground:
        _start(cluster, options)
        leave_supervisor(cluster, options.proxy, options.timeout_s)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    with cluster:
        _start(cluster, options)
        try:
            return Supervisor(cluster, _print, options.timeout_s).run()
        except SystemExit:
            cluster.stop(drain=True)  # a second signal ends the wait for requests in flight
            raise


def _start(cluster: LocalCluster, options: argparse.Namespace) -> None:
    state = cluster.start(options.config, options.timeout_s)
    _print(f"logs are in {state.logs}; `ranklet status{_same_folder(options)}` shows the state")


def _same_folder(options: argparse.Namespace) -> str:
    return "" if options.temp_dir == _default_temp_dir() else f" --temp-dir {options.temp_dir}"


def _exit(number: int, frame: object) -> None:
    notify_systemd("STOPPING=1")
    raise SystemExit(0)


def _deploy(options: argparse.Namespace) -> int:
    LocalCluster(options.temp_dir, report=_print).redeploy(options.config, options.timeout_s)
    return 0


def _status(options: argparse.Namespace) -> int:
    cluster = LocalCluster(options.temp_dir)
    supervision = _supervision(options.temp_dir)
    if not cluster.is_alive and read_supervisor(options.temp_dir) is not None:
        _print(f"not running. {supervision}")
        return 1
    state, status = cluster.state, cluster.status()
    if options.json:
        print(json.dumps(status.applications, indent=1))
    else:
        folder = options.temp_dir.absolute()
        settings = " ".join(f"{name}={value}" for name, value in auth_environment(folder).items())
        lines = [
            f"at {state.base_url}, {'ready' if cluster.is_ready() else 'not ready'}",
            *(line for _, line, _ in status.deployments()),
            *([f"the deployment failed: {status.failure}"] if status.failure else []),
            supervision,
            f"configuration: {cluster.config_file}",
            f"logs: {state.logs}",
            f"Serve's own view: {settings} serve status -a {state.dashboard}",
        ]
        for line in lines:
            _print(line)
    return int(not (status.is_running and cluster.is_ready()))


def _supervision(temp_dir: Path) -> str:
    supervisor = read_supervisor(temp_dir)
    if supervisor is None:
        return "no supervisor: if Ray ends, nothing starts it again"
    said = f"; last: {supervisor.said}" if supervisor.said else ""
    if not supervisor.is_running:
        return f"the supervisor has ended{said}"
    return f"the supervisor, process {supervisor.pid}, has started Ray again {supervisor.restarts} times{said}"


def _down(options: argparse.Namespace) -> int:
    cluster = LocalCluster(options.temp_dir, report=_print)
    running = cluster.state.base_url if find_supervisor(options.temp_dir) is None else str(options.temp_dir)
    cluster.stop(drain=True, now=options.now)
    _print(f"stopped {running}")
    return 0
