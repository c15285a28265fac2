"""The Prometheus endpoint of one process."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import ray
from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app, start_http_server

from ranklet.cluster.config import MetricsConfig

_PORTS_TRIED = 500
_EVERYWHERE = ("0.0.0.0", "::", "")
_App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

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
        server.set_app(_in_text_format(make_wsgi_app(registry)))
        return f"{_reachable(config.host)}:{server.server_port}"
    logger.error("metrics: no free port from %d on %s; this process has no metrics", config.first_port, config.host)
    return ""


def _in_text_format(app: _App) -> _App:
    """Answer every scrape in Prometheus' text format.

    In OpenMetrics, which Prometheus prefers, prometheus-client 0.26 writes `vllm:` as `vllm_`, except for scrapers that
    ask for UTF-8 names (prometheus/client_python#1177).
    """
    return lambda environ, start_response: app({**environ, "HTTP_ACCEPT": "text/plain"}, start_response)


def _ports(first_port: int) -> range:
    return range(first_port, min(first_port + _PORTS_TRIED, 65_536)) if first_port else range(1)


def _reachable(host: str) -> str:
    return str(ray.util.get_node_ip_address()) if host in _EVERYWHERE else host
