"""A real Prometheus evaluates the panels and rules of texts while it scrapes metrics of known events."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from threading import Event, Thread

import pytest

from deploy.grafana import board
from ranklet.cluster.config import MetricsConfig
from ranklet.cluster.exporter import start_exporter
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.replica.metrics import ReplicaMetrics
from ranklet.replicas.engine.stats import BatchRecord, KvCacheState, Snapshot
from ranklet.routing.counters import Counters
from tests.deploy.prometheus import Prometheus, finite, scraping
from tests.http_server import http_server
from tests.needs import needs

ADAPTERS = ("legal-v2", "medical")
SNAPSHOT = Snapshot(
    resident=ADAPTERS, hosted=(), waiting_requests=2, waiting_tokens=200, waiting_sequences=4, running_requests=8,
    waiting_adapters=(), running_adapters=ADAPTERS, slots=8, pool_bytes=1, host_bytes=2,
)  # fmt: skip
CACHE = KvCacheState(
    pages=100, used_pages=97, cached_pages=2, sequences=16, preemptions=0, asked_tokens=0, shared_tokens=0,
    evicted_pages=0,
)  # fmt: skip

pytestmark = needs("prometheus")


class EventsOfTexts:
    """A gateway's and a replica's metrics. Each turn, both adapters answer a text of nine tokens for a prompt of 128.

    First tokens take 30 ms, gaps 5 ms, and texts 70 ms. One of four prompt tokens is in the prefix cache. Every turn,
    one of the two sequences is preempted. A client leaves every tenth turn.
    """

    def __init__(self) -> None:
        self.gateway, self.replica = GatewayMetrics(10, Counters(), "demo-base"), ReplicaMetrics(10, "demo-base")
        self.turns = 0
        self.replica.watch(self._snapshot, os.getpid())

    def turn(self) -> None:
        for adapter in ADAPTERS:
            label, text = self.gateway.labels.label(adapter), self.gateway.text
            text.first_token(label, 0.03)
            for _ in range(4):
                text.tokens(2, 0.01)
            text.finished(label, ["stop" if adapter == ADAPTERS[0] else "length"], 0.07, 128, 9)
        if self.turns % 10 == 0:
            self.gateway.text.cancelled(self.gateway.labels.label(None), "client_gone")
        prompts, tokens, texts = (dict.fromkeys(ADAPTERS, count) for count in (1, 96, 9))
        self.replica.batch(BatchRecord(prompts, tokens, "csgmv", [0.01, 0.01], 0.02, texts))
        self.turns += 1

    def targets(self) -> list[dict[str, object]]:
        """Start an exporter for each process. Returns what `/metrics/targets` lists."""
        return [
            {"targets": [start_exporter(registry, MetricsConfig())], "labels": {"role": role, "replica": role}}
            for role, registry in (("gateway", self.gateway.registry), ("replica", self.replica.registry))
        ]

    def _snapshot(self) -> Snapshot:
        turns = self.turns
        cache = replace(CACHE, preemptions=turns, asked_tokens=256 * turns, shared_tokens=64 * turns)
        return replace(SNAPSHOT, kv_cache=cache)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    events, stop = EventsOfTexts(), Event()
    listed = json.dumps(events.targets()).encode()

    class Targets(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(listed)

        def log_message(self, *_: object) -> None: ...

    def run() -> None:
        while not stop.is_set():
            events.turn()
            time.sleep(0.05)

    thread = Thread(target=run)
    thread.start()
    try:
        with (
            http_server(Targets) as port,
            scraping(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("text-boards")) as found,
        ):
            yield found
    finally:
        stop.set()
        thread.join()


def shown(prometheus: Prometheus, title: str) -> dict[str, float]:
    """Return the lines of a panel of the row "Text": their values by legend."""
    (panel,) = [panel for panel in board.ROWS["Text"] if panel.title == title]
    lines = {}
    for legend, expr in panel.exprs.items():
        for sample in prometheus.panel_data(expr):
            name = legend
            for label, value in sample["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            lines[name] = float(sample["value"][1])
    return lines


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    for panel in board.ROWS["Text"]:
        for legend in (lines := shown(prometheus, panel.title)):
            assert "{{" not in legend, panel.title
        assert all(value >= 0 for value in lines.values()), panel.title


@pytest.mark.parametrize(
    ("title", "more_than_s", "up_to_s"),
    [
        ("Time to first token", 0.025, 0.05),
        ("Time between tokens", 0.004, 0.006),
        ("Time of a text", 0.05, 0.1),
    ],
)
def test_quantiles_are_in_the_bucket_of_the_value(
    prometheus: Prometheus, title: str, more_than_s: float, up_to_s: float
) -> None:
    lines = shown(prometheus, title)
    assert set(lines) == {"p50", "p95", "p99"}
    assert all(more_than_s < value <= up_to_s for value in lines.values()), lines


def test_rates_are_by_adapter_reason_and_source(prometheus: Prometheus) -> None:
    generated, prompts = shown(prometheus, "Generated tokens"), shown(prometheus, "Prompt tokens")
    assert {adapter for adapter, rate in generated.items() if rate} == set(ADAPTERS)
    assert 0 < prompts["found in the prefix cache"] < prompts["of texts"]
    assert set(shown(prometheus, "p99 of the time to first token")) == set(ADAPTERS)
    assert shown(prometheus, "Tokens found in the prefix cache") == {"replica": pytest.approx(0.25)}
    assert set(shown(prometheus, "Ended early")) == {"client_gone", "slow_reader", "error", "gateway_lost"}
    assert set(shown(prometheus, "Finish reasons")) == {"stop", "length"}


def test_the_state_of_the_cache_is_shown(prometheus: Prometheus) -> None:
    assert shown(prometheus, "Sequences") == {"running": 16, "waiting": 4}
    assert shown(prometheus, "Pages of keys and values") == {"used": 97, "cached": 2, "free": 1}
    assert shown(prometheus, "Preemptions")["replica"] > 0


def test_recording_rules_have_data(prometheus: Prometheus) -> None:
    recorded = [rule["name"] for rule in prometheus.rules() if rule["group"] == "ranklet-text"]
    assert len(recorded) == 5
    data = {name: finite(prometheus.panel_data(name)) for name in recorded}
    assert data["ranklet:kv_pages_used:ratio"] == [0.97]
    assert data["ranklet:prefix_found:ratio5m"] == [pytest.approx(0.25)]


@pytest.mark.parametrize(
    ("name", "quantile"),
    [("time_to_first_token", 0.99), ("inter_token_latency", 0.5), ("e2e_request_latency", 0.9)],
)
def test_quantiles_of_boards_made_for_vllm_have_data(prometheus: Prometheus, name: str, quantile: float) -> None:
    buckets = f'sum by (le) (rate(vllm:{name}_seconds_bucket{{model_name="demo-base"}}[10s]))'
    prometheus.panel_data(f"histogram_quantile({quantile}, {buckets})")


@pytest.mark.parametrize(
    "expr",
    [
        'sum by (le) (increase(vllm:request_prompt_tokens_bucket{model_name="demo-base"}[10s]))',
        'sum by (le) (increase(vllm:request_generation_tokens_bucket{model_name="demo-base"}[10s]))',
        'rate(vllm:prompt_tokens_total{model_name="demo-base"}[10s])',
        'rate(vllm:generation_tokens_total{model_name="demo-base"}[10s])',
        'sum by (finished_reason) (increase(vllm:request_success_total{model_name="demo-base"}[10s]))',
        'vllm:num_requests_running{model_name="demo-base"}',
        'vllm:num_requests_waiting{model_name="demo-base"}',
        'vllm:kv_cache_usage_perc{model_name="demo-base"}',
        "rate(vllm:prefix_cache_hits_total[10s]) / rate(vllm:prefix_cache_queries_total[10s])",
        "rate(vllm:num_preemptions_total[10s])",
        'vllm:cache_config_info{block_size="64"}',
        'vllm:lora_requests_info{running_lora_adapters="legal-v2,medical"}',
    ],
)
def test_other_expressions_made_for_vllm_have_data(prometheus: Prometheus, expr: str) -> None:
    prometheus.panel_data(expr)


def test_alerts_of_texts_are_evaluated(prometheus: Prometheus) -> None:
    """Sequences wait while nearly all pages are used, and every second one is preempted."""
    rules = {rule["name"]: rule for rule in prometheus.rules() if rule["type"] == "alerting"}
    for name in ("RankletCacheFull", "RankletPreemptions"):
        assert [sample["metric"]["replica"] for sample in prometheus.panel_data(rules[name]["query"])] == ["replica"]
    assert prometheus.query(rules["RankletFirstTokenSlow"]["query"]) == []
