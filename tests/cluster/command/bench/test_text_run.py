"""Complete runs for text against a server with every kind of stream."""

import json
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.run import run_bench
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.cluster.command.cli import main
from tests.cluster.command.bench import text_peer
from tests.cluster.command.bench.text_peer import FAILURES, FIRST_TEXT_S, WELL

TOKENS = 12


def plan(url: str, **fields: Any) -> BenchPlan:
    text = TextPlan(output_len=TOKENS, **fields.pop("text", {}))
    return BenchPlan(
        base_url=url, text=text, **{"num_prompts": 40, "input_len": 5, "processes": 2, "warmup": 0, **fields}
    )


@pytest.mark.parametrize("chat", [False, True])
def test_every_stream_is_counted_and_failures_are_named(
    chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    models = (*WELL, *FAILURES)
    requests = 4 * len(models)
    with text_peer.running() as server:
        flags = f"bench --task text --base-url {server.url} --num-prompts {requests} --input-len 6 --processes 2"
        rest = f"--output-len {TOKENS} --ignore-eos --warmup 0 --out {out} --plot {tmp_path / 'run.png'}"
        mix = ["--adapters", *models, "--adapter-distribution", "distinct", *["--chat"] * chat]
        assert main([*flags.split(), *rest.split(), *mix]) == 1
    assert len(server.requests) == requests
    assert all(body["ignore_eos"] for body in server.requests)
    found = json.loads(out.read_text())
    by_adapter = found["by_adapter"]
    for name in WELL:
        entry, text = by_adapter[name], by_adapter[name]["text"]
        assert (entry["answered"], entry["errors"], text["without_done"]) == (4, {}, 0), name
        assert text["output_tokens"] == 4 * TOKENS
        assert text["tokens_by_usage"] == (0 if name == "uncounted" else 4 * TOKENS)
        assert (entry["tokens"], text["cached_tokens"]) == ((0, 0) if name == "uncounted" else (12, 8))
        assert text["finish_reasons"] == {"length": 4}
        assert FIRST_TEXT_S * 1e3 <= text["ttft_p50_ms"] <= text["ttft_p99_ms"]  # a role chunk is no text
        assert text["ttft_p50_ms"] <= entry["p50_ms"]
        if text["gaps"]:  # a client that gets no CPU may read all frames of a text at once
            assert 0 < text["gap_p50_ms"] <= text["gap_p99_ms"] <= text["gap_max_ms"]
            assert text["tokens_per_gap"] >= (2 if name in ("packed", "joined", "counted-on") else 1)
    assert any(by_adapter[name]["text"]["gaps"] for name in WELL)
    assert by_adapter["packed"]["text"]["gaps"] <= 4 * (TOKENS // 3 - 1)
    assert by_adapter["plain"]["text"]["gaps"] <= 4 * (TOKENS - 1)
    for name, code in FAILURES.items():
        assert (by_adapter[name]["answered"], by_adapter[name]["errors"]) == (0, {code: 4})
        assert by_adapter[name]["text"]["ttft_p50_ms"] is None
    without = {name: by_adapter[name]["text"]["without_done"] for name in FAILURES}
    assert without == {"late-error": 0, "no-done": 4, "cut": 4, "busy": 0, "whole": 4, "broken": 0}
    assert found["overall"]["text"]["without_done"] == 12
    assert found["plan"]["text"]["output_len"] == TOKENS
    assert len(found["client"]["cpu_shares"]) == 2
    assert found["client"]["cpu_us_per_frame"] > 0
    output = capsys.readouterr().out
    for expected in ("4 x engine_dead", "12 streams ended without [DONE]", "32 x length", "by frames", "us per frame"):
        assert expected in output
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_whole_answers() -> None:
    with text_peer.running() as server:
        found = run_bench(plan(server.url, text={"stream": False}, adapters=("plain", "busy"), num_prompts=8))
    text = found.by_adapter["plain"].text
    assert text is not None
    assert (found.by_adapter["plain"].errors, set(found.by_adapter["busy"].errors)) == ({}, {"quota"})
    assert text.output_tokens == text.tokens_by_usage == TOKENS * found.by_adapter["plain"].answered > 0
    assert text.gaps == 0
    assert text.ttft_p50_ms != text.ttft_p50_ms  # unknown


def test_streams_in_flight_are_limited_and_connections_are_used_again() -> None:
    with text_peer.running() as server:
        found = run_bench(plan(server.url, max_concurrency=5))
    assert found.overall.answered == 40
    assert server.most_in_flight == 5
    assert len(server.connections) == 5
    assert sum(found.tokens) == 40 * TOKENS


def test_a_log_larger_than_the_pipe_arrives() -> None:
    with text_peer.running() as server:
        fields = {"num_prompts": 2500, "max_concurrency": 50, "processes": 1}
        found = run_bench(plan(server.url, text={"stream": False}, **fields))
    assert found.overall.answered == 2500


def test_the_time_to_the_first_text_counts_from_the_planned_time() -> None:
    with text_peer.running() as server:
        found = run_bench(plan(server.url, request_rate=200.0, max_concurrency=None))
        assert found.overall.text is not None
        assert found.overall.text.ttft_p50_ms >= FIRST_TEXT_S * 1e3
        assert found.client.mean_late_ms is not None
        assert server.most_in_flight > 2


def test_a_warm_up_that_fails_stops_the_run() -> None:
    with text_peer.running() as server:
        with pytest.raises(ValueError, match=r"from a warm-up request for busy .* got quota: .*too much"):
            run_bench(plan(server.url, adapters=("busy",), warmup=1))
        with pytest.raises(ValueError, match="got no_done"):
            run_bench(plan(server.url, adapters=("no-done",), warmup=1))
        assert run_bench(plan(server.url, adapters=("plain",), warmup=2)).overall.answered == 40
    assert len(server.requests) == 1 + 1 + 42
