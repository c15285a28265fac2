"""Metrics of one replica, exported to Prometheus."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from ranklet.cluster.labels import BASE, LATENCY_BUCKETS_S, AdapterLabels
from ranklet.cluster.replica.engine_state import EngineStateMetrics, EngineTotals
from ranklet.replicas.adapters.reference import LoadRecord
from ranklet.replicas.engine.stats import BatchRecord, Listener, Snapshot
from ranklet.replicas.errors import AdapterChanged

_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class ReplicaMetrics(Listener):
    """Converts an engine's records to metrics.

    Args:
        model: name of the base model, for the label `model_name` of vLLM's metrics.
    """

    def __init__(self, top_adapters: int, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        latency = partial(histogram, buckets=LATENCY_BUCKETS_S)
        self.prompts = counter("ranklet_prompts_total", "Prompts computed", ["adapter"])
        self.tokens = counter(
            "ranklet_tokens_total", "Prompt tokens computed, and tokens computed again after a preemption", ["adapter"]
        )
        self.generated = counter("ranklet_generated_tokens_total", "Tokens of generated texts", ["adapter"])
        self.generated.labels(BASE)  # a rate misses the first event of a series that does not start at 0
        self.batches = counter("ranklet_batches_total", "Batches run, by LoRA backend", ["backend"])
        self.queue_wait = latency("ranklet_queue_wait_seconds", "Wait of a prompt for its batch")
        self.compute = latency("ranklet_batch_compute_seconds", "Time a batch occupies the device", ["backend"])
        self.busy = counter(
            "ranklet_device_busy_seconds_total", "Computing time of the device; its rate is the utilisation"
        )
        self.batch_tokens = histogram("ranklet_batch_tokens", "Tokens of a batch", buckets=_TOKENS)
        self.batch_adapters = histogram("ranklet_batch_adapters", "Adapters mixed in a batch", buckets=_ADAPTERS)
        self.tier_hits = counter("ranklet_tier_hits_total", "Requests by the tier that held their adapter", ["tier"])
        self.loads = counter("ranklet_adapter_loads_total", "Loads of an adapter into a slot", ["tier", "outcome"])
        for tier in ("disk", "host"):
            for outcome in ("loaded", "refused", "changed"):
                self.loads.labels(tier, outcome)
        self.load_seconds = latency("ranklet_adapter_load_seconds", "Duration of a load", ["tier"])
        self.fetches = latency("ranklet_source_fetch_seconds", "Duration of a download into the node's cache")
        self.fetched_bytes = counter("ranklet_source_bytes_total", "Bytes downloaded into the node's cache")
        self.evictions = counter("ranklet_adapter_evictions_total", "Adapters evicted from a slot")
        self.cancelled_prompts = counter("ranklet_cancelled_prompts_total", "Prompts of clients that disconnected")
        # Under the name of the gateways' own metric, since the gateway is gone.
        self.texts_cancelled = counter(
            "ranklet_text_cancelled_total", "Calls whose text ended early, by reason", ["adapter", "reason"]
        )
        self.texts_cancelled.labels(BASE, "gateway_lost")
        self.labels = AdapterLabels(top_adapters, self._forget)
        self._totals = EngineTotals()
        self._model = model

    def batch(self, record: BatchRecord) -> None:
        for adapter, tokens in record.tokens_by_adapter.items():
            prompts = record.prompts_by_adapter.get(adapter, 0)
            label = self.labels.label(adapter, max(prompts, 1))
            self.prompts.labels(label).inc(prompts)
            self.tokens.labels(label).inc(tokens)
        for adapter, tokens in record.generated_by_adapter.items():
            self.generated.labels(self.labels.label(adapter, 0)).inc(tokens)
        self._totals.tokens += record.tokens
        self._totals.generated += record.generated
        self.batches.labels(record.backend).inc()
        self.compute.labels(record.backend).observe(record.compute_s)
        self.busy.inc(record.compute_s)
        self.batch_tokens.observe(record.tokens + record.generated)
        self.batch_adapters.observe(record.adapters)
        for wait_s in record.queue_waits_s:
            self.queue_wait.observe(wait_s)

    def load(self, record: LoadRecord) -> None:
        outcome = "changed" if record.error == AdapterChanged.code else "refused" if record.error else "loaded"
        self.loads.labels(record.tier, outcome).inc()
        if not record.error:
            self.load_seconds.labels(record.tier).observe(record.seconds)
            self._totals.ranks[record.adapter] = record.rank

    def downloaded(self, url: str, seconds: float, size: int) -> None:
        self.fetches.observe(seconds)
        self.fetched_bytes.inc(size)

    def evicted(self, adapter: str) -> None:
        self.evictions.inc()

    def tier_hit(self, tier: str) -> None:
        self.tier_hits.labels(tier).inc()

    def cancelled(self, prompts: int) -> None:
        self.cancelled_prompts.inc(prompts)

    def on_gateway_lost(self, adapter: str | None) -> None:
        """Record a text call that ended since its gateway was gone."""
        self.texts_cancelled.labels(self.labels.label(adapter, 0), "gateway_lost").inc()

    def watch(self, snapshot: Callable[[], Snapshot], pid: int) -> None:
        """Export gauges that are read from the engine at each scrape, and the resource usage of the process `pid`."""
        self.registry.register(EngineStateMetrics(snapshot, self._totals, self._model, self.labels.limit))
        ProcessCollector(namespace="ranklet_engine", pid=lambda: pid, registry=self.registry)

    def _forget(self, adapter: str) -> None:
        for metric in (self.prompts, self.tokens, self.generated, self.texts_cancelled):
            metric.remove_by_labels({"adapter": adapter})
