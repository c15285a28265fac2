"""An engine's records and state become metrics."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from ranklet.cluster.replica.metrics import ReplicaMetrics
from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.engine.stats import BatchRecord, KvCacheState, Snapshot
from ranklet.replicas.errors import Unavailable

CACHE = KvCacheState(
    pages=40, used_pages=10, cached_pages=6, sequences=3, preemptions=2, asked_tokens=640, shared_tokens=128,
    evicted_pages=5,
)  # fmt: skip
SNAPSHOT = Snapshot(
    resident=("a",), hosted=(), waiting_requests=4, waiting_tokens=99, waiting_sequences=7, running_requests=3,
    waiting_adapters=(), running_adapters=("a",), slots=8, pool_bytes=1, host_bytes=2, kv_cache=CACHE,
)  # fmt: skip
DECODES = BatchRecord({}, {}, "csgmv", [], 0.004, {"a": 3, "": 1})


def exported(registry: CollectorRegistry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_state_of_the_key_value_cache_is_exported() -> None:
    metrics = ReplicaMetrics(10, "demo-base")
    metrics.watch(lambda: SNAPSHOT, 1)
    found = exported(metrics.registry)
    assert {name: found[name] for name in found if "kv_pages" in name or "prefix" in name or "sequences" in name} == {
        "ranklet_kv_pages,used": 10, "ranklet_kv_pages,cached": 6, "ranklet_kv_pages,free": 24,
        "ranklet_prefix_cache_asked_tokens_total": 640, "ranklet_prefix_cache_shared_tokens_total": 128,
        "ranklet_running_sequences": 3, "ranklet_waiting_sequences": 7,
        "vllm:prefix_cache_queries_total,demo-base": 640, "vllm:prefix_cache_hits_total,demo-base": 128,
    }  # fmt: skip
    assert (found["ranklet_preemptions_total"], found["ranklet_kv_evicted_pages_total"]) == (2, 5)


def test_state_is_exported_under_the_names_that_other_routers_read() -> None:
    metrics = ReplicaMetrics(10, "demo-base")
    metrics.watch(lambda: SNAPSHOT, 1)
    metrics.batch(BatchRecord({"a": 1}, {"a": 30, "b": 64}, "csgmv", [0.1], 0.01, {"a": 1}))
    metrics.batch(DECODES)
    found = exported(metrics.registry)
    read = {name: found[name] for name in found if name.startswith("vllm:") and name.endswith(",demo-base")}
    assert read == {
        "vllm:num_requests_waiting,demo-base": 4, "vllm:num_requests_running,demo-base": 3,
        "vllm:kv_cache_usage_perc,demo-base": 0.25, "vllm:num_preemptions_total,demo-base": 2,
        "vllm:prefix_cache_queries_total,demo-base": 640, "vllm:prefix_cache_hits_total,demo-base": 128,
        "vllm:prompt_tokens_total,demo-base": 30 + 64 + 128, "vllm:generation_tokens_total,demo-base": 1 + 4,
    }  # fmt: skip
    assert found["vllm:cache_config_info,64,40"] == 1


def test_a_replica_of_embeddings_has_no_series_of_a_key_value_cache() -> None:
    metrics = ReplicaMetrics(10, "demo-base")
    metrics.watch(lambda: replace(SNAPSHOT, kv_cache=None), 1)
    assert not any("kv" in name or "prefix" in name or "sequences" in name for name in exported(metrics.registry))


def test_an_engine_that_does_not_answer_exports_the_other_metrics() -> None:
    def ended() -> Snapshot:
        raise Unavailable("ended")

    metrics = ReplicaMetrics(10, "demo-base")
    metrics.watch(ended, 1)
    found = exported(metrics.registry)
    assert "ranklet_slots" not in found
    assert "ranklet_device_busy_seconds_total" in found


def test_generated_tokens_are_counted_by_adapter() -> None:
    metrics = ReplicaMetrics(10, "demo-base")
    metrics.batch(BatchRecord({"a": 1}, {"a": 30, "b": 64}, "csgmv", [0.1], 0.01, {"a": 1}))
    metrics.batch(DECODES)
    found = exported(metrics.registry)
    assert (found["ranklet_generated_tokens_total,a"], found["ranklet_generated_tokens_total,base"]) == (4, 1)
    assert (found["ranklet_prompts_total,a"], found["ranklet_prompts_total,b"]) == (1, 0)
    assert (found["ranklet_tokens_total,a"], found["ranklet_tokens_total,b"]) == (30, 64)
    assert found["ranklet_batch_tokens_sum"] == 94 + 1 + 4
    assert found["ranklet_batch_adapters_sum"] == 2 + 1


def test_an_adapter_that_loses_its_label_loses_its_series() -> None:
    metrics = ReplicaMetrics(1, "demo-base")
    metrics.batch(BatchRecord({"a": 1}, {"a": 5}, "csgmv", [], 0.01, {"a": 1}))
    metrics.batch(BatchRecord({"b": 500}, {"b": 500}, "csgmv", [], 0.01, {"b": 7}))
    found = exported(metrics.registry)
    assert found["ranklet_generated_tokens_total,b"] == 7
    assert not any(name.endswith("_total,a") for name in found)


def test_steps_of_decodes_alone_do_not_change_the_speed_of_prompts() -> None:
    state = ReplicaState("r", 4, 64)
    state.batch(DECODES)
    assert state.wait_s() == 0
    state.batch(BatchRecord({"": 1}, {"": 1000}, "none", [], 1.0))
    state.batch(DECODES)
    state.call_arrived("g", 500)
    assert state.wait_s() == pytest.approx(0.5)
