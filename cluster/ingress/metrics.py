"""Metrics of one gateway, exported to Prometheus."""

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ranklet.cluster.labels import BASE, LATENCY_BUCKETS_S, AdapterLabels
from ranklet.routing.counters import SPILLS, Counters


class GatewayMetrics:
    """Requests as clients see them, one instance per gateway process."""

    def __init__(self, top_adapters: int, choices: Counters) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "ranklet_requests_total",
            "Requests answered, by adapter, HTTP status and error code",
            ["adapter", "status", "code"],
        )
        self.seconds = histogram(
            "ranklet_request_seconds",
            "From the first byte of the body to the answer",
            ["adapter"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.in_flight = gauge("ranklet_requests_in_flight", "Requests in this gateway")
        self.retries = counter("ranklet_retries_total", "Calls repeated on another replica")
        self.client_gone = counter("ranklet_client_gone_total", "Requests whose client left before the answer")
        self.quota_rejections = counter(
            "ranklet_quota_rejections_total", "Requests over the quota of their key or adapter", ["by", "adapter"]
        )
        for by in ("key", "adapter"):
            self.quota_rejections.labels(by, BASE)
        self.labels = AdapterLabels(top_adapters, self._forget)
        self.registry.register(_Choices(choices))
        ProcessCollector(registry=self.registry)

    def answered(self, adapter: str, status: int, code: str, seconds: float) -> None:
        """`adapter` is a label value; `code` the error's code, "" for success."""
        self.requests.labels(adapter, str(status), code).inc()
        self.seconds.labels(adapter).observe(seconds)

    def _forget(self, adapter: str) -> None:
        for metric in (self.requests, self.seconds, self.quota_rejections):
            metric.remove_by_labels({"adapter": adapter})


class _Choices(Collector):
    """What this gateway's router chose, read at each scrape."""

    def __init__(self, choices: Counters) -> None:
        self._choices = choices

    def collect(self) -> Iterable[CounterMetricFamily]:
        seen = self._choices
        hits = "Requests sent to a replica that had said it holds their adapter"
        yield CounterMetricFamily("ranklet_affinity_hits", hits, seen.hits)
        yield CounterMetricFamily("ranklet_affinity_misses", "Requests sent to one that had not", seen.misses)
        spills = CounterMetricFamily("ranklet_spills", "Requests sent elsewhere than home, and why", labels=["reason"])
        for reason in SPILLS:
            spills.add_metric([reason], seen.spills[reason])
        yield spills
        ordered = "Replicas told to load an adapter ahead of its requests"
        yield CounterMetricFamily("ranklet_prefetches", ordered, seen.prefetches)
