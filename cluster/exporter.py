"""A Prometheus endpoint per process, on a port of its own, with a registry of its own."""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from ranklet.cluster.config import MetricsConfig

_PORTS_TRIED = 500
_EVERYWHERE = ("0.0.0.0", "::", "")

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Exporter:
    """A running endpoint; `target` is `host:port` as Prometheus can reach it, "" when no port could be had."""

    target: str

    @classmethod
    def start(cls, registry: CollectorRegistry, config: MetricsConfig) -> "Exporter":
        """Serve `registry` from a thread. Never raises: a process without metrics is better than none."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter that nobody asks for
        for port in _ports(config.first_port):
            try:
                server: Any = start_http_server(port, config.host, registry)[0]
            except OSError as error:
                logger.debug("metrics port %d: %s", port, error)
                continue
            return cls(f"{_reachable(config.host)}:{server.server_port}")
        logger.error("metrics: no free port from %d on %s; this process exports none", config.first_port, config.host)
        return cls("")


def _ports(first_port: int) -> range:
    return range(first_port, min(first_port + _PORTS_TRIED, 65_536)) if first_port else range(1)


def _reachable(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host in _EVERYWHERE else host
