"""Metrics that are read from the engine at each scrape, under ranklet's names and under those of vLLM."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.stats import KvCacheState, Snapshot
from ranklet.replicas.errors import RankletError


@dataclass
class EngineTotals:
    """Facts of a replica that a snapshot of its engine lacks.

    Attributes:
        tokens: computed tokens of prompts, of all adapters since the start.
        generated: generated tokens.
        ranks: rank of each adapter that was loaded.
    """

    tokens: int = 0
    generated: int = 0
    ranks: dict[str, int] = field(default_factory=dict)


class EngineStateMetrics(Collector):
    """State of the engine, and the metrics of vLLM that other routers and boards read.

    Args:
        model: name of the base model, for the label `model_name` of vLLM's metrics.
        top_adapters: how many adapters of the host cache are listed.
    """

    def __init__(self, snapshot: Callable[[], Snapshot], totals: EngineTotals, model: str, top_adapters: int) -> None:
        self._snapshot = snapshot
        self._totals = totals
        self._model = model
        self._top_adapters = top_adapters

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
        yield self._gauge("num_requests_waiting", "Requests with a prompt that waits", now.waiting_requests)
        yield self._gauge("num_requests_running", "Requests that are computed", now.running_requests)
        yield self._lora_requests(now)
        yield self._adapters_loaded(now)
        if now.kv_cache is not None:
            yield GaugeMetricFamily(
                "ranklet_waiting_sequences", "Prompts that wait, and texts that were preempted", now.waiting_sequences
            )
            yield from _kv_cache(now.kv_cache)
            yield from self._text_of_vllm(now.kv_cache)

    def _text_of_vllm(self, cache: KvCacheState) -> Iterable[Metric]:
        used = cache.used_pages / cache.pages if cache.pages else 0.0
        yield self._gauge("kv_cache_usage_perc", "Used part of the key-value cache, from 0 to 1", used)
        info = GaugeMetricFamily("vllm:cache_config_info", "Pages", labels=["block_size", "num_gpu_blocks"])
        info.add_metric([str(PAGE_TOKENS), str(cache.pages)], 1.0)
        yield info
        totals = self._totals
        for name, about, count in (
            ("num_preemptions", "Sequences that lost their pages to others", cache.preemptions),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache", cache.asked_tokens),
            ("prefix_cache_hits", "Tokens found in the prefix cache", cache.shared_tokens),
            ("prompt_tokens", "Prompt tokens, computed or found in the cache", totals.tokens + cache.shared_tokens),
            ("generation_tokens", "Generated tokens", totals.generated),
        ):
            family = CounterMetricFamily(f"vllm:{name}", about, labels=["model_name"])
            family.add_metric([self._model], count)
            yield family

    def _gauge(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

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
        for level, names in (("gpu", now.resident), ("cpu", hosted[: self._top_adapters])):
            for name in names:
                pinned = "true" if name in now.pinned else "false"
                loaded.add_metric([name, level, pinned, str(self._totals.ranks.get(name, ""))], 1.0)
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
