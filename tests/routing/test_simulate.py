"""The simulation is consistent, and in it the policy beats rules that see every queue."""

import json
from typing import Any

import pytest

from ranklet.cluster.command.cli import main
from ranklet.replicas.adapters.reference import RECENTLY_USED_S
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest, Speed
from ranklet.routing.simulate.simulator import SimulatedCluster
from ranklet.routing.simulate.study import RULES, Study, rate_for
from ranklet.routing.simulate.traffic import Traffic

SPEED = Speed(tokens_per_s=1000, launch_s=0.01, batch_tokens=100, disk_s=0.5, host_s=0.1)


def study(
    replicas: int, adapters: int, *, zipf: float = 1.1, load: float = 0.7, seconds: float = 8, **more: Any
) -> Study:
    cluster = SimulatedCluster(replicas, RECENTLY_USED_S, warm_s=seconds / 2, **more)
    return Study(cluster, Traffic(rate_for(load, cluster, 6000), adapters, zipf, 6000, seconds))


def arrivals(asked: Study) -> list[tuple[float, str, int]]:
    assert isinstance(asked.traffic, Traffic)
    return list(asked.traffic.draw())


def engine_with(slots: int, max_hosted: int) -> SimulatedEngine:
    return SimulatedEngine(slots, max_hosted, SPEED, RECENTLY_USED_S)


def test_an_engine_runs_what_is_ready_oldest_first() -> None:
    engine = engine_with(2, 2)
    for id, adapter, tokens in ((0, "a", 60), (1, None, 60), (2, None, 60), (3, None, 30)):
        engine.add_request(SimulatedRequest(id, adapter, tokens, 0, 0.0))
    assert engine.start_loads() == [("a", 0.5)]
    assert engine.start_batch(0.0) == pytest.approx(0.01 + 0.06)
    assert [request.id for request in engine.running] == [1], "2 is too large beside it, and 3 does not overtake 2"
    assert engine.start_batch(0.0) is None
    engine.complete_load("a", 0.0)
    assert [request.id for request in engine.finish_batch()] == [1]
    engine.start_batch(1.0)
    assert [request.id for request in engine.running] == [0]
    assert engine.queued_tokens == 150


def test_an_engine_evicts_the_least_recently_used_without_requests() -> None:
    engine = engine_with(2, 1)
    for name in ("a", "b"):
        engine.add_request(SimulatedRequest(0, name, 10, 0, 0.0))
        engine.start_loads()
        engine.complete_load(name, 0.0)
    engine.start_batch(0.0)
    engine.add_request(SimulatedRequest(1, "a", 10, 0, 0.0))
    engine.add_request(SimulatedRequest(2, "c", 10, 0, 0.0))
    assert engine.start_loads() == [], "a has a request in the queue, b runs"
    engine.finish_batch()
    assert engine.start_loads() == [("c", 0.5)]
    assert list(engine.resident) == ["a"]


@pytest.mark.parametrize("rule", RULES)
def test_every_request_is_answered_once(rule: str) -> None:
    asked = study(8, 80, seconds=4)
    outcome = asked.run(rule)
    drawn = arrivals(asked)
    assert sorted(outcome.arrived_s) == [at_s for at_s, _, _ in drawn]
    assert min(outcome.wait_s) >= 0
    served_s = sum(tokens for at_s, _, tokens in drawn if at_s >= 2) / asked.cluster.speed.tokens_per_s
    if not outcome.unfinished:
        assert sum(outcome.busy_s) >= 0.9 * served_s


def test_ranklet_beats_a_rule_that_sees_every_queue() -> None:
    asked = study(32, 320)
    ours, two = asked.run("ranklet").row(), asked.run("power of two").row()
    assert ours["hit rate"] >= 0.97
    assert ours["p99_ms"] <= 0.6 * two["p99_ms"]


def test_no_request_is_lost_when_replicas_die_and_start() -> None:
    asked = study(12, 60, load=0.5, lose=(3.0, (0, 1, 2, 3)), join=(5.0, (0, 1, 2, 3)))
    outcome = asked.run("ranklet")
    assert outcome.resent > 0
    assert outcome.unfinished == 0
    assert len(outcome.arrived_s) == len(arrivals(asked))
    assert outcome.busy_s[0] > 0


def test_routers_with_old_reports_do_not_all_choose_the_same_replica() -> None:
    fresh, stale = (study(32, 320, gateways=32, late_s=late_s).run("ranklet").row() for late_s in (0.0, 5.0))
    assert stale["p99_ms"] < 2.3 * fresh["p99_ms"]
    assert stale["busiest / mean"] < 1.4


def test_the_command_prints_and_saves_a_row_per_rule(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--replicas 4 --adapters 20 --seconds 2 --workers 2 --out {tmp_path / 'o.json'}".split()
    assert main(["simulate", *words, "--rules", "ranklet", "round robin"]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"][1]["rule"] == "round robin"
    assert "4 replicas" in capsys.readouterr().out
    for wrong, said in (
        (["--replicas", "0"], "--replicas"),
        (["--lose", "1", "9"], "--lose"),
        (["--warm-s", "9"], "--warm"),
    ):
        assert main(["simulate", *words, *wrong]) == 1
        assert said in capsys.readouterr().err
