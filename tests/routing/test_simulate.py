"""The simulation: it keeps its own books, and in it the policy does what it is for."""

import json
from typing import Any

import pytest

from ranklet.cluster.command.cli import main
from ranklet.routing.simulate.engine import SimulatedEngine, SimulatedRequest, Speed
from ranklet.routing.simulate.study import RULES, Study, rate_for
from ranklet.routing.simulate.traffic import Traffic
from ranklet.routing.simulate.world import Setting

SPEED = Speed(tokens_per_s=1000, launch_s=0.01, batch_tokens=100, disk_s=0.5, host_s=0.1)


def study(
    replicas: int, adapters: int, *, zipf: float = 1.1, load: float = 0.7, seconds: float = 8, **more: Any
) -> Study:
    setting = Setting(replicas, warm_s=seconds / 2, **more)
    return Study(setting, Traffic(rate_for(load, setting, 6000), adapters, zipf, 6000, seconds))


def test_an_engine_runs_what_is_ready_oldest_first() -> None:
    engine = SimulatedEngine(2, 2, SPEED)
    for id, adapter, tokens in ((0, "a", 60), (1, None, 60), (2, None, 60), (3, None, 30)):
        engine.take(SimulatedRequest(id, adapter, tokens, 0, 0.0))
    assert engine.bring() == [("a", 0.5)]
    assert engine.launch(0.0) == pytest.approx(0.01 + 0.06)
    assert [request.id for request in engine.running] == [1], "2 is too large beside it, and 3 does not overtake 2"
    assert engine.launch(0.0) is None
    engine.loaded("a", 0.0)
    assert [request.id for request in engine.finish()] == [1]
    engine.launch(1.0)
    assert [request.id for request in engine.running] == [0]
    assert engine.queued_tokens == 150


def test_an_engine_evicts_the_least_recently_used_that_nobody_wants() -> None:
    engine = SimulatedEngine(2, 1, SPEED)
    for name in ("a", "b"):
        engine.take(SimulatedRequest(0, name, 10, 0, 0.0))
        engine.bring()
        engine.loaded(name, 0.0)
    engine.launch(0.0)
    engine.take(SimulatedRequest(1, "a", 10, 0, 0.0))
    engine.take(SimulatedRequest(2, "c", 10, 0, 0.0))
    assert engine.bring() == [], "a is wanted, b runs"
    engine.finish()
    assert engine.bring() == [("c", 0.5)]
    assert list(engine.resident) == ["a"]


@pytest.mark.parametrize("rule", RULES)
def test_every_request_is_answered_once(rule: str) -> None:
    asked = study(8, 80, seconds=4)
    outcome = asked.run(rule)
    drawn = list(asked.traffic.draw())
    assert sorted(outcome.arrived_s) == [at_s for at_s, _, _ in drawn]
    assert min(outcome.wait_s) >= 0
    served_s = sum(tokens for at_s, _, tokens in drawn if at_s >= 2) / asked.setting.speed.tokens_per_s
    if not outcome.unfinished:
        assert sum(outcome.busy) >= 0.9 * served_s


def test_it_beats_rules_that_see_every_queue() -> None:
    asked = study(32, 320)
    ours, two = asked.run("ranklet").row(), asked.run("power of two").row()
    assert ours["hit rate"] >= 0.97
    assert ours["p99_ms"] <= 0.6 * two["p99_ms"]


def test_replicas_die_and_come_and_nothing_is_lost() -> None:
    asked = study(12, 60, load=0.5, lose=(3.0, (0, 1, 2, 3)), join=(5.0, (0, 1, 2, 3)))
    outcome = asked.run("ranklet")
    assert outcome.lost > 0
    assert outcome.unfinished == 0
    assert len(outcome.arrived_s) == len(list(asked.traffic.draw()))
    assert outcome.busy[0] > 0


def test_stale_routers_do_not_herd() -> None:
    fresh, stale = (study(32, 320, gateways=32, late_s=late_s).run("ranklet").row() for late_s in (0.0, 5.0))
    assert stale["p99_ms"] < 3 * fresh["p99_ms"]
    assert stale["busiest / mean"] < 1.6


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--replicas",
        "4",
        "--adapters",
        "20",
        "--seconds",
        "2",
        "--workers",
        "2",
        "--out",
        str(tmp_path / "o.json"),
    ]
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
