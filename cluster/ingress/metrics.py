"""Metrics of one gateway, exported to Prometheus."""

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ranklet.cluster.ingress.text_metrics import TextMetrics
from ranklet.cluster.labels import BASE, LATENCY_BUCKETS_S, AdapterLabels
from ranklet.routing.counters import SPILLS, Counters


class GatewayMetrics:
    """Metrics of the requests to one gateway process.

    Args:
        model: name of the base model.
    """

    def __init__(self, top_adapters: int, routing: Counters, model: str) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=LATENCY_BUCKETS_S)
        self.requests = counter(
            "ranklet_requests_total",
            "Requests answered, by adapter, HTTP status and error code",
            ["adapter", "status", "code"],
        )
        self.seconds = histogram("ranklet_request_seconds", "From a request's headers to its embeddings", ["adapter"])
        self.in_flight = gauge("ranklet_requests_in_flight", "Requests in this gateway")
        self.retries = counter("ranklet_retries_total", "Calls repeated on another replica")
        self.continuations = counter(
            "ranklet_continuations_total", "Repeated calls that continue texts of which a part was generated"
        )
        self.client_gone = counter("ranklet_client_gone_total", "Requests whose client disconnected before the answer")
        self.quota_rejections = counter(
            "ranklet_quota_rejections_total", "Requests over the quota of their key or adapter", ["by", "adapter"]
        )
        for by in ("key", "adapter"):
            self.quota_rejections.labels(by, BASE)
        self.labels = AdapterLabels(top_adapters, self._drop_series)
        self.text = TextMetrics(self.registry, self.labels, model)
        self.registry.register(_RoutingCounters(routing))
        ProcessCollector(registry=self.registry)

    def on_answer(self, adapter: str, status: int, code: str, seconds: float | None) -> None:
        """Count a request, and record its time.

        Args:
            adapter: a value that `labels` returned.
            code: code of the error, "" for success.
            seconds: None for a request for text.
        """
        self.requests.labels(adapter, str(status), code).inc()
        if seconds is not None:
            self.seconds.labels(adapter).observe(seconds)

    def on_repeat(self, continues: bool) -> None:
        """Count a call that is repeated, and whether that continues texts."""
        self.retries.inc()
        self.continuations.inc(continues)

    def on_over_quota(self, by: str, adapter: str | None) -> None:
        """Count a request over the quota of its key or adapter; `adapter` is None for the base model."""
        self.quota_rejections.labels(by, self.labels.label(adapter, 0)).inc()

    def _drop_series(self, adapter: str) -> None:
        for metric in (self.requests, self.seconds, self.quota_rejections):
            metric.remove_by_labels({"adapter": adapter})
        self.text.drop(adapter)


class _RoutingCounters(Collector):
    """Exports the counters of this gateway's router. Reads them at each scrape."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterable[CounterMetricFamily]:
        seen = self._counters
        yield CounterMetricFamily(
            "ranklet_affinity_hits", "Requests sent to a replica that has reported their adapter", seen.hits
        )
        yield CounterMetricFamily(
            "ranklet_affinity_misses", "Requests sent to a replica that has not reported their adapter", seen.misses
        )
        spills = CounterMetricFamily(
            "ranklet_spills", "Requests sent to another replica than their adapter's home, by reason", labels=["reason"]
        )
        for reason in SPILLS:
            spills.add_metric([reason], seen.spills[reason])
        yield spills
        yield CounterMetricFamily("ranklet_prefetches", "Prefetch orders sent to replicas", seen.prefetches)
