"""The Prometheus endpoint of one process."""

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from ranklet.cluster.config import MetricsConfig
from ranklet.cluster.exporter import start_exporter


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain",
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.2",
    ],
)
def test_names_with_colons_are_the_same_for_every_scraper(accept: str) -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Requests that are computed", registry=registry).set(3)
    target = start_exporter(registry, MetricsConfig())
    answer = httpx.get(f"http://{target}/metrics", headers={"Accept": accept}, trust_env=False)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:num_requests_running 3.0" in answer.text.splitlines()
