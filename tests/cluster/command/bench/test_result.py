"""Rates and percentiles of records with known results."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from ranklet.cluster.command.bench.client import ClientLog, SentRequest
from ranklet.cluster.command.bench.result import ClientLoad, summarize
from ranklet.cluster.command.bench.show import plot_result, print_result


def logs() -> list[ClientLog]:
    """Return logs of two processes: 100 answers of 1..100 ms from "a", two failures of "b", in a run of 2 s."""
    first = [SentRequest(10.0, 10.001, 10.001 + i / 1e3, 7, 2, "a", "ok") for i in range(1, 101)]
    second = [
        SentRequest(11.0, 11.5, 11.6, 0, 2, "b", "quota"),
        SentRequest(11.0, 11.02, 12.001, 0, 2, "b", "TimeoutError"),
    ]
    return [ClientLog(first, 0.5, 0.25, [0.001] * 50), ClientLog(second, 0.52, 0.26, [0.002] * 50)]


def test_numbers_of_a_closed_loop() -> None:
    found = summarize(logs(), 102, open_loop=False)
    assert found.seconds == pytest.approx(2.0)
    overall = found.overall
    assert (overall.requests, overall.answered, overall.prompts, overall.tokens) == (102, 100, 200, 700)
    rates = overall.requests_per_s, overall.prompts_per_s, overall.tokens_per_s
    assert rates == pytest.approx((50, 100, 350))
    waits = overall.mean_ms, overall.p50_ms, overall.p90_ms, overall.p95_ms, overall.p99_ms
    assert waits == pytest.approx((50.5, 50.5, 90.1, 95.05, 99.01))
    assert overall.errors == {"quota": 1, "TimeoutError": 1}
    assert list(found.by_adapter) == ["a", "b"]
    assert found.by_adapter["a"].p99_ms == pytest.approx(99.01)
    assert (found.by_adapter["b"].requests, found.by_adapter["b"].answered) == (2, 0)
    assert math.isnan(found.by_adapter["b"].p50_ms)


def test_the_clients_own_cost_is_measured() -> None:
    client = summarize(logs(), 102, open_loop=False).client
    assert (client.processes, client.busiest) == (2, 0.26)
    assert client.cpu_ms_per_request == pytest.approx(10.0)
    assert (client.p99_lag_ms, client.max_lag_ms) == pytest.approx((2.0, 2.0))
    assert client.mean_late_ms is client.p99_late_ms is client.max_late_ms is None
    assert client.suspicion is None


def test_latency_in_an_open_loop_counts_from_the_planned_time() -> None:
    found = summarize(logs(), 102, open_loop=True)
    assert found.overall.p50_ms == pytest.approx(51.5)
    client = found.client
    assert client.max_late_ms == pytest.approx(500)
    assert client.mean_late_ms == pytest.approx((100 * 1 + 500 + 20) / 102)
    assert client.suspicion is not None
    assert "late" in client.suspicion


@pytest.mark.parametrize(("busiest", "lag", "expected"), [(0.9, 0.0, "90%"), (0.1, 30.0, "30 ms"), (0.8, 10.0, None)])
def test_a_client_that_may_be_the_bottleneck_is_reported(busiest: float, lag: float, expected: str | None) -> None:
    suspicion = ClientLoad(1, busiest, 0.1, lag, lag, None, None, None).suspicion
    assert suspicion is None if expected is None else expected in str(suspicion)


def test_unknown_numbers_are_null() -> None:
    facts = json.loads(json.dumps(summarize(logs(), 110, open_loop=False).to_json(), allow_nan=False))
    assert facts["by_adapter"]["b"]["p99_ms"] is None
    assert facts["client"]["p99_late_ms"] is None
    assert (facts["planned"], facts["overall"]["requests"]) == (110, 102)


def test_a_run_without_answers_has_no_result() -> None:
    with pytest.raises(ValueError, match="expected at least one request"):
        summarize([ClientLog()], 5, open_loop=False)


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    found = summarize(logs(), 110, open_loop=True)
    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    with console.file:
        print_result(found, console)
    text = console.export_text()
    for expected in ("100 of 110 requests", "1 x quota", "1 x TimeoutError", "interrupted: 8", "bottleneck", "51.5"):
        assert expected in text
    plot_result(found, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    plot_result(summarize([logs()[1]], 2, open_loop=False), tmp_path / "failed.svg")
    assert (tmp_path / "failed.svg").stat().st_size > 1000
