"""The command line and environment of a Ray head that shares its machine with others."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ranklet.cluster.command.ports import free_block, free_ports
from ranklet.cluster.datapath import FAST_PATH

_OBJECT_STORE_BYTES = 100 << 20  # vectors do not travel through it
_GATEWAY_PORTS = 64
_TOKEN_FILE = "auth_token"

Proxy = Literal["haproxy", "serve"]


@dataclass(frozen=True)
class RayHead:
    """Ports of one Ray head, all chosen free."""

    temp_dir: Path
    proxy: Proxy
    gcs_port: int
    dashboard_port: int
    others: tuple[int, ...]
    gateway_block: int  # first of the ports on which gateways listen for HAProxy

    @classmethod
    def with_free_ports(cls, temp_dir: Path, proxy: Proxy) -> "RayHead":
        gcs, dashboard, *others = free_ports(12)
        return cls(temp_dir, proxy, gcs, dashboard, tuple(others), free_block(2 * _GATEWAY_PORTS))

    @property
    def address(self) -> str:
        """For `ray.init`."""
        return f"127.0.0.1:{self.gcs_port}"

    @property
    def dashboard(self) -> str:
        """For `serve -a`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def head_command(self) -> list[str]:
        """`ray start` in the foreground; it ends its children when it ends."""
        agent, agent_grpc, metrics, client, runtime_env = self.others[:5]
        return [
            script_path("ray"), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
            f"--runtime-env-agent-port={runtime_env}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={self.temp_dir}",
        ]  # fmt: skip

    def node_command(self, resources: Mapping[str, float], num_cpus: int) -> list[str]:
        """`ray start` of one more node of this cluster, on the same machine."""
        agent, agent_grpc, metrics, runtime_env = free_ports(4)
        return [
            script_path("ray"), "start", f"--address={self.address}", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}", f"--resources={json.dumps(dict(resources))}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime_env}",
        ]  # fmt: skip

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """This process's environment with what decides the data path, and paths and ports of this cluster's own."""
        http, grpc, metrics, stats = self.others[5:9]
        haproxy = self.temp_dir / "haproxy"
        first, second = self.gateway_block, self.gateway_block + _GATEWAY_PORTS
        settings = {
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # on SIGTERM: no other node could take over
            **{name: value if self.proxy == "haproxy" else "0" for name, value in FAST_PATH.items()},
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(second - 1),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(second),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(second + _GATEWAY_PORTS - 1),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # no load balancer to wait for but our own
        }
        return {**os.environ, **settings, **auth_environment(self.temp_dir), "RAY_USAGE_STATS_ENABLED": "0", **more}


def write_token(temp_dir: Path) -> None:
    """A new secret for a cluster: Ray listens on all interfaces, and whoever may talk to it may run code."""
    path = temp_dir / _TOKEN_FILE
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))


def read_token(temp_dir: Path) -> str:
    """The secret of the cluster of `temp_dir`."""
    return (temp_dir / _TOKEN_FILE).read_text()


def auth_environment(temp_dir: Path) -> dict[str, str]:
    """What processes need in their environment to talk to the cluster of `temp_dir`.

    Ray decides by a file in the home folder when nothing is said, so it is always said.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(temp_dir / _TOKEN_FILE)}


def script_path(name: str) -> str:
    """A command installed beside this Python, whether or not its folder is on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
