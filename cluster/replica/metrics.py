"""Metrics of one replica, exported to Prometheus."""

import time
from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ranklet.cluster.labels import LATENCY_BUCKETS_S, AdapterLabels
from ranklet.replicas.adapters.reference import LoadRecord
from ranklet.replicas.engine.stats import BatchRecord, KvCacheState, Listener, Snapshot
from ranklet.replicas.errors import AdapterChanged, RankletError

_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class ReplicaMetrics(Listener):
    """Converts an engine's records to metrics."""

    def __init__(self, top_adapters: int) -> None:
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
        for tier in ("disk", "host"):  # a rate misses the first event of a series that does not start at 0
            for outcome in ("loaded", "refused", "changed"):
                self.loads.labels(tier, outcome)
        self.load_seconds = latency("ranklet_adapter_load_seconds", "Duration of a load", ["tier"])
        self.fetches = latency("ranklet_source_fetch_seconds", "Duration of a download into the node's cache")
        self.fetched_bytes = counter("ranklet_source_bytes_total", "Bytes downloaded into the node's cache")
        self.evictions = counter("ranklet_adapter_evictions_total", "Adapters evicted from a slot")
        self.cancelled_prompts = counter("ranklet_cancelled_prompts_total", "Prompts of clients that disconnected")
        self.labels = AdapterLabels(top_adapters, self._forget)
        self.ranks: dict[str, int] = {}

    def batch(self, record: BatchRecord) -> None:
        for adapter, tokens in record.tokens_by_adapter.items():
            prompts = record.prompts_by_adapter.get(adapter, 0)
            label = self.labels.label(adapter, max(prompts, 1))
            self.prompts.labels(label).inc(prompts)
            self.tokens.labels(label).inc(tokens)
        for adapter, tokens in record.generated_by_adapter.items():
            self.generated.labels(self.labels.label(adapter, 0)).inc(tokens)
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
            self.ranks[record.adapter] = record.rank

    def downloaded(self, url: str, seconds: float, size: int) -> None:
        self.fetches.observe(seconds)
        self.fetched_bytes.inc(size)

    def evicted(self, adapter: str) -> None:
        self.evictions.inc()

    def tier_hit(self, tier: str) -> None:
        self.tier_hits.labels(tier).inc()

    def cancelled(self, prompts: int) -> None:
        self.cancelled_prompts.inc(prompts)

    def watch(self, snapshot: Callable[[], Snapshot], pid: int) -> None:
        """Export gauges that are read from the engine at each scrape, and the resource usage of the process `pid`."""
        self.registry.register(_EngineGauges(snapshot, self.ranks, self.labels))
        ProcessCollector(namespace="ranklet_engine", pid=lambda: pid, registry=self.registry)

    def _forget(self, adapter: str) -> None:
        for metric in (self.prompts, self.tokens, self.generated):
            metric.remove_by_labels({"adapter": adapter})


class _EngineGauges(Collector):
    """Gauges and counters of the engine's state, and the metrics of vLLM that other routers read."""

    def __init__(self, snapshot: Callable[[], Snapshot], ranks: dict[str, int], labels: AdapterLabels) -> None:
        self._snapshot = snapshot
        self._ranks = ranks
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        try:
            now = self._snapshot()
        except (RankletError, TimeoutError):  # the engine has ended or hangs
            return
        yield GaugeMetricFamily("ranklet_waiting_requests", "Requests with a prompt that waits", now.waiting_requests)
        yield GaugeMetricFamily("ranklet_waiting_tokens", "Tokens waiting for a batch", now.waiting_tokens)
        yield GaugeMetricFamily("ranklet_running_requests", "Requests that are computed", now.running_requests)
        pools = GaugeMetricFamily("ranklet_pool_bytes", "Memory of the adapter pools", labels=["pool"])
        pools.add_metric(["gpu"], now.pool_bytes)
        pools.add_metric(["host"], now.host_bytes)
        yield pools
        yield GaugeMetricFamily("ranklet_slots", "Adapter slots on the device", now.slots)
        yield GaugeMetricFamily("ranklet_resident_adapters", "Adapters in a slot", len(now.resident))
        if now.kv_cache is not None:
            yield from _kv_cache(now.kv_cache)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests with a prompt that waits", now.waiting_requests)
        yield GaugeMetricFamily("vllm:num_requests_running", "Requests that are computed", now.running_requests)
        yield self._lora_requests(now)
        yield self._adapters_loaded(now)

    @staticmethod
    def _lora_requests(now: Snapshot) -> GaugeMetricFamily:
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters waiting and running; the value is the time of the scrape",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        waiting, running = ",".join(now.waiting_adapters), ",".join(now.running_adapters)
        info.add_metric([str(now.slots), waiting, running], time.time())
        return info

    def _adapters_loaded(self, now: Snapshot) -> GaugeMetricFamily:
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Adapters in GPU or host memory",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        hosted = [name for name in now.hosted if name not in now.resident]
        for level, names in (("gpu", now.resident), ("cpu", hosted[: self._labels.limit])):
            for name in names:
                pinned = "true" if name in now.pinned else "false"
                loaded.add_metric([name, level, pinned, str(self._ranks.get(name, ""))], 1.0)
        return loaded


def _kv_cache(now: KvCacheState) -> Iterable[Metric]:
    pages = GaugeMetricFamily(
        "ranklet_kv_pages", "Pages of the key-value cache: used, cached for later sequences, or free", labels=["state"]
    )
    free = now.pages - now.used_pages - now.cached_pages
    for state, count in (("used", now.used_pages), ("cached", now.cached_pages), ("free", free)):
        pages.add_metric([state], count)
    yield pages
    yield GaugeMetricFamily("ranklet_running_sequences", "Sequences with pages", now.sequences)
    for name, about, count in (
        (
            "ranklet_preemptions_total",
            "Sequences that lost their pages to others and are computed again",
            now.preemptions,
        ),
        (
            "ranklet_prefix_cache_asked_tokens_total",
            "Tokens that sequences looked up in the prefix cache",
            now.asked_tokens,
        ),
        (
            "ranklet_prefix_cache_shared_tokens_total",
            "Tokens that sequences found in the prefix cache",
            now.shared_tokens,
        ),
        ("ranklet_kv_evicted_pages_total", "Cached pages that were given to other tokens", now.evicted_pages),
    ):
        yield CounterMetricFamily(name, about, count)
    used = now.used_pages / now.pages if now.pages else 0.0
    yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Used part of the key-value cache, from 0 to 1", used)
