"""The command line and the environment of a Ray head that shares its machine with other clusters."""

import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ranklet.cluster.command.cluster_state import ray_dir
from ranklet.cluster.command.haproxy import PROGRAM_VARIABLE, write_haproxy
from ranklet.cluster.command.no_proxy import no_proxy_variables
from ranklet.cluster.command.own_folder import OwnFolder
from ranklet.cluster.command.ports import free_block, free_ports
from ranklet.cluster.command.user import user_variables
from ranklet.cluster.datapath import DRAIN_VARIABLE, FAST_PATH, HEALTH_CHECKS

_OBJECT_STORE_BYTES = 100 << 20  # vectors do not travel through it
_GATEWAY_PORTS = 64
_TOKEN_FILE = "auth_token"
STOPPING_FILE = "stopping"  # exists while gateways let their requests in flight end
# Ray creates sockets below its folder, with names of up to 64 characters, and HAProxy below a folder that the node's id
# names. The path of a socket may have 107 characters. HAProxy appends ten to that of a new socket.
MAX_TEMP_DIR_CHARACTERS = min(107 - 64 - len("/ray"), 97 - len("/haproxy/") - 56 - len("/admin.sock"))

# Ray without support for further nodes, which is its default on macOS only, listens on loopback. Otherwise it replaces
# 127.0.0.1 by the machine's address, and listens on all interfaces.
SEVERAL_NODES_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

Proxy = Literal["haproxy", "serve"]


@dataclass(frozen=True)
class RayHead:
    """The free ports chosen for one Ray head, and what starts it."""

    temp_dir: Path
    proxy: Proxy
    gcs_port: int
    dashboard_port: int
    service_ports: tuple[int, ...]  # agent, agent's gRPC, metrics, client server, runtime environments
    proxy_ports: tuple[int, ...]  # fallback proxy's HTTP and gRPC, HAProxy's metrics and statistics
    first_gateway_port: int  # of the ports on which gateways listen for HAProxy
    on_loopback: bool  # else Ray and its metrics listen on all interfaces

    @classmethod
    def with_free_ports(cls, temp_dir: Path, proxy: Proxy, *, on_loopback: bool) -> "RayHead":
        gcs, dashboard, *others = free_ports(11)
        services, proxies = tuple(others[:5]), tuple(others[5:])
        first_gateway = free_block(2 * _GATEWAY_PORTS)
        return cls(temp_dir, proxy, gcs, dashboard, services, proxies, first_gateway, on_loopback)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs_port}"  # for `ray.init`

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"  # for `serve -a`

    def head_command(self) -> list[str]:
        """Return the command line of a `ray start` that stays in the foreground. Its child processes end with it."""
        agent, agent_grpc, metrics, client, runtime_env = self.service_ports
        return [
            script_path("ray"), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
            f"--runtime-env-agent-port={runtime_env}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={ray_dir(self.temp_dir)}",
        ]  # fmt: skip

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Return this process's environment with the data path, ports, paths and token of this cluster, and `extra`.

        Writes the program that starts HAProxy.
        """
        folder = self.temp_dir / "haproxy"
        program = folder / "haproxy"
        has_program = self.proxy == "haproxy" and write_haproxy(program)
        settings = {
            **({PROGRAM_VARIABLE: str(program)} if has_program else {}),
            **({SEVERAL_NODES_VARIABLE: "0"} if self.on_loopback else {}),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # on SIGTERM: no other node could take over
            **{name: value if self.proxy == "haproxy" else "0" for name, value in FAST_PATH.items()},
            **_serve_settings(folder, self.proxy_ports, self.first_gateway_port),
        }
        own = {DRAIN_VARIABLE: str(self.temp_dir / STOPPING_FILE), "RAY_USAGE_STATS_ENABLED": "0"}
        return {
            **os.environ,
            **user_variables(),
            **no_proxy_variables(),
            **settings,
            **auth_environment(self.temp_dir),
            **own,
            **extra,
        }


def _serve_settings(folder: Path, ports: Sequence[int], first_gateway_port: int) -> dict[str, str]:
    http, grpc, metrics, stats = ports
    first_grpc_port = first_gateway_port + _GATEWAY_PORTS
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log.sock"),  # paths may have 97 characters
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        **HEALTH_CHECKS,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_gateway_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_grpc_port - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_grpc_port + _GATEWAY_PORTS - 1),
        # HAProxy passes over a gateway that drains after its next health check, within some 1 s. A request would be
        # lost that it sends while the gateway closes its port and idle connections.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    }


# All environment variables of Serve that ranklet sets.
SERVE_VARIABLES = (*FAST_PATH, PROGRAM_VARIABLE, *_serve_settings(Path(), (0, 0, 0, 0), 0))


def write_token(temp_dir: Path) -> None:
    """Create a new token for a cluster. Without one, anyone who can connect to Ray can run code."""
    OwnFolder(temp_dir).write(_TOKEN_FILE, secrets.token_hex(32))


def read_token(temp_dir: Path) -> str:
    return OwnFolder(temp_dir).read(_TOKEN_FILE)


def auth_environment(temp_dir: Path) -> dict[str, str]:
    """Return the environment variables that a client of the cluster of `temp_dir` needs.

    RAY_AUTH_MODE is one of them, because Ray otherwise looks for a token in the home folder.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(temp_dir / _TOKEN_FILE)}


def script_path(name: str) -> str:
    """Return the path of a command installed beside this Python, whether or not its folder is on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def make_short_folder() -> Path:
    """Create a folder of this user in the system's temporary folder, or in /tmp if that one's path is too long."""
    folder = tempfile.mkdtemp(prefix="ranklet-")
    if len(folder) > MAX_TEMP_DIR_CHARACTERS:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="ranklet-", dir="/tmp")
    return Path(folder)
