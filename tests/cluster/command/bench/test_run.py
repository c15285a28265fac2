"""Complete runs against a server with every kind of failure, and against the real cluster."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.run import run_bench
from ranklet.cluster.command.cli import main
from tests.cluster.command.bench import peer
from tests.cluster.command.bench.peer import BAD, BASE, ERRORS, GOOD
from tests.cluster.nodes import child_processes, command_line
from tests.cluster.service import Service, eventually


def plan(url: str, **fields: Any) -> BenchPlan:
    return BenchPlan(base_url=url, **{"num_prompts": 60, "input_len": 5, "processes": 2, "warmup": 0, **fields})


def test_every_failure_is_counted_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    with peer.running() as server:
        flags = f"bench --base-url {server.url} --num-prompts 70 --input-len 6 --processes 2 --warmup 0 --out {out}"
        mix = ["--adapters", *GOOD, *BAD, "--adapter-distribution", "distinct", "--plot", str(tmp_path / "run.png")]
        assert main([*flags.split(), *mix]) == 1
    found = json.loads(out.read_text())
    assert len(server.requests) == 70
    by_adapter = found["by_adapter"]
    assert {name: entry["requests"] for name, entry in by_adapter.items()} == dict.fromkeys((*GOOD, *BAD), 10)
    for name, code in ERRORS.items():
        assert (by_adapter[name]["answered"], by_adapter[name]["errors"]) == (0, {code: 10})
    for name in GOOD:
        assert (by_adapter[name]["answered"], by_adapter[name]["tokens"], by_adapter[name]["errors"]) == (10, 60, {})
    assert found["overall"]["errors"]["bad_answer"] >= 10
    assert found["server"] == {"version": "1.2"}
    assert (found["plan"]["num_prompts"], found["client"]["processes"]) == (70, 2)
    assert "10 x quota" in capsys.readouterr().out
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_each_process_checks_the_values_of_its_first_answer() -> None:
    with peer.running() as server:
        found = run_bench(plan(server.url, adapters=("hole",), max_concurrency=2))
    assert found.overall.errors == {"bad_answer": 2}


def test_the_warm_up_sends_other_prompts_to_each_adapter_and_is_not_counted() -> None:
    with peer.running() as server:
        fields = {"adapters": ("good-*",), "warmup": 4, "batch_size": 3, "processes": 1}
        fields["adapter_distribution"] = "identical"
        found = run_bench(plan(server.url, **fields))
        assert run_bench(plan(server.url, **fields)).overall.answered == 20
    first, measured = server.requests[:4], server.requests[4:24]
    assert {body["model"] for body in first} == {"good-1"}  # the only adapter of the run
    assert not [body for body in first if body in measured]
    assert (found.overall.requests, found.overall.prompts, found.overall.tokens) == (20, 60, 300)


def test_a_refused_warm_up_stops_the_run() -> None:
    with peer.running() as server, pytest.raises(ValueError, match=r"got 429: .*too much"):
        run_bench(plan(server.url, adapters=("busy",), warmup=1))


def test_a_server_that_cannot_be_reached_stops_the_run() -> None:
    with pytest.raises(ValueError, match=r"expected a list of models at http://127\.0\.0\.1:9/v1/models"):
        run_bench(plan("http://127.0.0.1:9"))
    with pytest.raises(ValueError, match=r"expected a server at http://127\.0\.0\.1:9/v1/embeddings"):
        run_bench(plan("http://127.0.0.1:9", model="m", warmup=1))


def test_adapter_patterns_the_api_key_and_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not used: no proxy may be measured
    with peer.running() as server:
        run_bench(plan(server.url, api_key="secret", num_prompts=4, processes=1))
        assert {body["model"] for body in server.requests} == {BASE}
        assert server.keys == {"Bearer secret"}
        fields = {"adapters": ("good-*", "good-1"), "adapter_as": "lora_path", "adapter_distribution": "distinct"}
        run_bench(plan(server.url, **fields, processes=1))
        assert {body.get("lora_path") for body in server.requests[4:]} == set(GOOD)
        with pytest.raises(ValueError, match=r"--adapters: 'x\*' matches none of the server's 7"):
            run_bench(plan(server.url, adapters=("x*",)))


def test_max_concurrency_limits_requests_in_flight() -> None:
    with peer.running(slow_s=0.02) as server:
        found = run_bench(plan(server.url, max_concurrency=5))
        assert server.most_in_flight == 5
        assert found.overall.p50_ms >= 20
        server.most_in_flight = 0
        assert run_bench(plan(server.url, max_concurrency=1, num_prompts=3)).client.processes == 1
        assert server.most_in_flight == 1


def test_an_open_loop_sends_at_the_planned_times() -> None:
    with peer.running(slow_s=0.05) as server:
        found = run_bench(plan(server.url, num_prompts=200, request_rate=200.0))
    assert found.overall.answered == 200
    assert 0.6 < found.seconds < 60  # a busy machine may be late, and must not be early
    assert server.most_in_flight > 2
    assert found.client.mean_late_ms is not None


def test_progress_ends_at_the_number_of_requests() -> None:
    seen: list[tuple[int, int]] = []
    with peer.running(slow_s=0.1) as server:
        run_bench(plan(server.url, max_concurrency=10), lambda done, of: seen.append((done, of)))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (60, 60)


def test_ctrl_c_reports_the_answers_so_far(tmp_path: Path) -> None:
    flags = f"--num-prompts 4000 --max-concurrency 4 --processes 2 --warmup 0 --out {tmp_path / 'run.json'}"
    with peer.running(slow_s=0.05) as server:
        command = [sys.executable, "-m", "ranklet.cluster.command.cli", "bench", "--base-url", server.url]
        run = subprocess.Popen(
            [*command, *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        )  # fmt: skip
        eventually("requests arrive", lambda: len(server.requests) >= 40)
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (1, "")
    assert "interrupted" in output
    found = json.loads((tmp_path / "run.json").read_text())
    assert 30 <= found["overall"]["answered"] == found["overall"]["requests"] < 4000
    assert found["planned"] == 4000


def test_client_processes_end_with_their_parent() -> None:
    with peer.running(slow_s=0.02) as server:
        command = [sys.executable, "-m", "ranklet.cluster.command.cli", "bench", "--base-url", server.url]
        flags = "--num-prompts 20000 --max-concurrency 2 --processes 2 --warmup 0 --input-len 8"
        with subprocess.Popen([*command, *flags.split()], stdout=subprocess.DEVNULL) as run:
            eventually("requests arrive", lambda: len(server.requests) >= 10)
            clients = child_processes(run.pid)
            assert len(clients) == 2
            run.kill()
        eventually("the client processes end", lambda: not any(map(command_line, clients)))
        assert len(server.requests) < 20_000


@pytest.mark.parametrize(
    ("vocab", "flags", "bound"),
    [
        (50, [], 50),
        (None, [], 10_000),
        (10**6, [], 10_000),
        (50, ["--vocab-size", "300"], 300),
        (50, ["--model", "x"], 10_000),
    ],
)
def test_random_ids_are_of_the_servers_vocabulary(
    vocab: int | None, flags: list[str], bound: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with peer.running() as server:
        server.vocab = vocab
        sizes = f"--base-url {server.url} --num-prompts 40 --input-len 50 --processes 1 --warmup 0"
        main(["bench", *sizes.split(), *flags])
    ids = [token for body in server.requests for prompt in body["input"] for token in _as_list(prompt)]
    assert bound / 2 < max(ids) < bound
    capsys.readouterr()


def _as_list(prompt: int | list[int]) -> list[int]:
    return [prompt] if isinstance(prompt, int) else prompt


def test_a_load_process_imports_neither_torch_nor_ray() -> None:
    imported = "{'torch', 'ray', 'transformers', 'pydantic'} & {*sys.modules}"
    probe = f"import sys, ranklet.cluster.command.bench.worker; print({imported})"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "set()"


def test_the_real_cluster_through_the_command(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    flags = f"bench --base-url {service.url} --num-prompts 120 --input-len 24 --range-ratio 0.5"
    rest = f"--batch-size 2 --max-concurrency 16 --processes 2 --adapter-distribution zipf:1.1 --out {out}"
    assert main([*flags.split(), *rest.split(), "--adapters", "legal-v2", "medical", "finance*"]) == 0
    found = json.loads(out.read_text())
    overall = found["overall"]
    assert (overall["requests"], overall["answered"], overall["prompts"], overall["errors"]) == (60, 60, 120, {})
    assert set(found["by_adapter"]) == {"legal-v2", "medical", "finance-mlp"}
    assert sum(entry["tokens"] for entry in found["by_adapter"].values()) == overall["tokens"]
    assert 120 * 12 <= overall["tokens"] <= 120 * 25
    assert found["server"]["ray"].startswith("2.")


def test_the_real_cluster_refuses_with_error_codes(service: Service) -> None:
    asked = plan(service.url, num_prompts=8, vocab=1000, adapters=("medical", "no-such"), processes=1)
    found = run_bench(dataclasses.replace(asked, adapter_distribution="distinct"))
    assert found.overall.errors == {"model_not_found": 4}
    assert found.by_adapter["medical"].answered == 4
