"""Settings that Ray reads from the environment of `ray start`: Serve's HTTP ingress, and token authentication."""

import ipaddress
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

ROUTER = "ranklet.routing.router:AdapterRouter"  # chooses the replica of each call
# Environment of `ray start`, on every node, for the recommended data path.
FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
# With these, Serve notices within a second that HAProxy died and within some 16 s that it hangs, and HAProxy within 5 s
# that a gateway hangs. Ray's own values take half a minute and 10 s. If the actor beside a HAProxy hangs, Serve ends
# that HAProxy and with it all streams, so a pause of a busy machine must be shorter than three timeouts. Serve kills an
# unhealthy process at once, for which it would otherwise wait as long as for one that drains.
HEALTH_CHECKS = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.25",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
# The address of the client, in requests that HAProxy passes on. cluster/command/front_door.py sets it.
CLIENT_HEADER = "x-ranklet-client"
# Names a file. While it exists, gateways refuse new requests and let those in flight end. Once DRAIN_IS_OVER is written
# into it, those in flight end with an error.
DRAIN_VARIABLE = "RANKLET_DRAIN_FILE"
DRAIN_IS_OVER = "over"
# Defaults of graceful_shutdown_timeout_s by deployment. Texts that take longer than their gateway's end with an error;
# those that take longer than their replica's go on elsewhere.
SHUTDOWN_TIMEOUTS_S = {"Gateway": 600.0, "Replica": 20.0}
_EVERYWHERE = "0.0.0.0"
_PACKAGES = ("ranklet", "ray", "torch", "triton", "transformers")
_TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN in the environment of `ray start` on every "
    "node; `ranklet up` does it"
)

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class DataPath:
    """Serve's HTTP ingress, and whether its throughput optimizations are on."""

    ingress: str  # "haproxy" or "serve-proxy"
    throughput_optimized: bool

    @classmethod
    def current(cls) -> "DataPath":
        haproxy, optimized = (os.environ.get(name) == "1" for name in FAST_PATH)
        return cls("haproxy" if haproxy else "serve-proxy", optimized)

    def summary(self) -> str:
        if self.ingress == "haproxy" and self.throughput_optimized:
            return "data path: HAProxy, throughput optimized"
        settings = " ".join(f"{name}={value}" for name, value in FAST_PATH.items())
        return (
            f"data path: {self.ingress}, throughput optimized: {str(self.throughput_optimized).lower()}. "
            f"Several times more requests per second with {settings} in the environment of `ray start` on every node; "
            "`ranklet up` sets it"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def missing_token(environment: Mapping[str, str]) -> str | None:
    """Return how to turn on Ray's token authentication; None if `environment` turns it on.

    Without the token, anyone who can connect to a node can run code on it: Ray's servers unpickle what they receive.
    """
    is_on = environment.get("RAY_AUTH_MODE", "").lower() == "token"
    return None if is_on else _TOKEN_REMEDY


def refuse_missing_token(*, open_ray: bool) -> None:
    """Refuse to serve if Ray's token is off on this node. Call it in a Ray process.

    This holds on loopback too: the gRPC servers of gateways and replicas always listen on all interfaces.

    Args:
        open_ray: `security.open_ray`; then the fault is only logged.

    Raises:
        RuntimeError: the token is off.
    """
    remedy = missing_token(os.environ)
    if remedy is None:
        return
    import ray  # the command line imports this module, and does not wait for Ray

    fault = f"anyone who can connect to {ray.util.get_node_ip_address()} can run code on it: {remedy}"
    if not open_ray:
        raise RuntimeError(f"{fault}. To serve all the same, set security.open_ray: true")
    logger.error("%s", fault)


def serve_controller() -> Any:
    """Return the handle of Serve's controller. Call it in a process of Serve.

    Raises:
        ValueError: there is none.
    """
    import ray

    return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


def http_host() -> str:
    """Return the address on which Serve listens. Call it in a process of Serve."""
    import ray

    options: Any = ray.get(serve_controller().get_http_config.remote())
    return str(options.host or _EVERYWHERE)


def versions() -> dict[str, Any]:
    """Return installed versions and the data path, for `GET /version`."""
    path = DataPath.current()
    return {
        **{name: version_of(name) for name in _PACKAGES},
        "data_path": path.ingress,
        "throughput_optimized": path.throughput_optimized,
    }


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
