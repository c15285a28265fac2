"""Texts of a gateway become metrics under ranklet's names and those of vLLM."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ranklet.cluster.ingress.histogram import WeightedHistogram
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.routing.counters import Counters


def exported(metrics: GatewayMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> GatewayMetrics:
    return GatewayMetrics(2, Counters(), "demo-base")


def test_a_text_is_recorded_under_both_names(metrics: GatewayMetrics) -> None:
    label = metrics.labels.label("legal")
    metrics.text.first_token(label, 0.03)
    metrics.text.tokens(1, 0.005)
    metrics.text.tokens(4, 0.06)
    metrics.text.finished(label, ["stop", "length"], 1.5, 30, 40)
    found = exported(metrics)
    for name, adapter in (
        ("ranklet_text_first_token_seconds", "legal"),
        ("vllm:time_to_first_token_seconds", "demo-base"),
    ):
        assert (found[f"{name}_count,{adapter}"], found[f"{name}_sum,{adapter}"]) == (1, 0.03)
    for suffix in ("legal", "base"):
        assert found[f"ranklet_text_choices_total,{suffix},stop"] == (suffix == "legal")
    assert found["vllm:request_success_total,stop,demo-base"] == 1
    assert found["vllm:request_success_total,length,demo-base"] == 1
    assert found["ranklet_text_duration_seconds_sum"] == found["vllm:e2e_request_latency_seconds_sum,demo-base"] == 1.5
    assert found["ranklet_text_prompt_tokens_total,legal"] == found["vllm:request_prompt_tokens_sum,demo-base"] == 30
    assert found["ranklet_text_generated_tokens_total,legal"] == 40
    assert found["vllm:request_generation_tokens_bucket,50.0,demo-base"] == 1


def test_each_token_of_a_frame_counts_with_its_part_of_the_gap(metrics: GatewayMetrics) -> None:
    metrics.text.tokens(1, 0.005)
    metrics.text.tokens(4, 0.06)
    found = exported(metrics)
    assert (
        found["ranklet_text_token_gap_seconds_count"] == found["vllm:inter_token_latency_seconds_count,demo-base"] == 5
    )
    assert found["ranklet_text_token_gap_seconds_sum"] == pytest.approx(0.065)
    assert found["ranklet_text_token_gap_seconds_bucket,0.006"] == 1
    assert found["ranklet_text_token_gap_seconds_bucket,0.015"] == 5


def test_cancels_have_a_reason_and_start_at_zero(metrics: GatewayMetrics) -> None:
    metrics.text.cancelled(metrics.labels.label(None), "slow_reader")
    found = exported(metrics)
    assert {name: value for name, value in found.items() if name.startswith("ranklet_text_cancelled_total")} == {
        "ranklet_text_cancelled_total,base,client_gone": 0,
        "ranklet_text_cancelled_total,base,slow_reader": 1,
        "ranklet_text_cancelled_total,base,error": 0,
    }


def test_names_of_ignored_fields_are_bounded(metrics: GatewayMetrics) -> None:
    for number in range(200):
        metrics.text.ignored_field(f"x{number}")
    metrics.text.ignored_field("y" * 1000)
    metrics.text.ignored_field("")
    found = {
        name: value for name, value in exported(metrics).items() if name.startswith("ranklet_ignored_fields_total")
    }
    assert len(found) == 31
    assert found["ranklet_ignored_fields_total,other"] == 172


def test_an_adapter_that_loses_its_label_counts_as_other_and_stays_in_vllms_sums(metrics: GatewayMetrics) -> None:
    old = metrics.labels.label("old")
    metrics.labels.label("busy", 1000)
    metrics.text.first_token(old, 0.5)
    metrics.text.finished(old, ["stop"], 1.0, 3, 4)
    metrics.labels.label("new", 1000)
    assert not any(",old" in name for name in exported(metrics))
    metrics.text.first_token(old, 0.5)
    metrics.text.finished(old, ["stop"], 1.0, 3, 4)
    metrics.text.cancelled(old, "error")
    found = exported(metrics)
    assert not any(",old" in name for name in found)
    assert found["ranklet_text_first_token_seconds_count,other"] == 1
    assert found["ranklet_text_cancelled_total,other,error"] == 1
    assert found["vllm:time_to_first_token_seconds_count,demo-base"] == 2
    assert found["vllm:e2e_request_latency_seconds_sum,demo-base"] == 2.0


def test_a_histogram_counts_a_value_at_its_bound() -> None:
    histogram = WeightedHistogram((1.0, 2.0))
    for value, weight in ((1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, weight)
    assert histogram.state() == ([("1.0", 2.0), ("2.0", 3.0), ("+Inf", 6.0)], 30.5)
