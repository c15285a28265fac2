"""The Prometheus endpoint of one process."""

import logging
from typing import Any

import ray
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from ranklet.cluster.config import MetricsConfig

_PORTS_TRIED = 500
_EVERYWHERE = ("0.0.0.0", "::", "")

logger = logging.getLogger("ray.serve")


def start_exporter(registry: CollectorRegistry, config: MetricsConfig) -> str:
    """Serve `registry` from a thread.

    Returns:
        `host:port` for Prometheus. "" if no port is free: an error is logged, and the process has no metrics.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # one more gauge for each counter
    for port in _ports(config.first_port):
        try:
            server: Any = start_http_server(port, config.host, registry)[0]
        except OSError as error:
            logger.debug("metrics port %d: %s", port, error)
            continue
        return f"{_reachable(config.host)}:{server.server_port}"
    logger.error("metrics: no free port from %d on %s; this process has no metrics", config.first_port, config.host)
    return ""


def _ports(first_port: int) -> range:
    return range(first_port, min(first_port + _PORTS_TRIED, 65_536)) if first_port else range(1)


def _reachable(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host in _EVERYWHERE else host
