"""The simulated texts are consistent, and with them the policy beats rules that see every queue."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.cli import main
from ranklet.replicas.adapters.reference import RECENTLY_USED_S
from ranklet.routing.simulate.conversations import Conversations, SimulatedText, TextTraffic
from ranklet.routing.simulate.outcome import SimulationResult
from ranklet.routing.simulate.pages import SimulatedPages
from ranklet.routing.simulate.simulator import SimulatedCluster
from ranklet.routing.simulate.study import TEXT_RULES, Study, text_rate_for
from ranklet.routing.simulate.text_engine import SimulatedTextEngine, TextSpeed
from ranklet.routing.simulate.text_outcome import TextResult


def study(replicas: int, *, seconds: float = 8, kv_tokens: int = 1_000_000, load: float = 0.7) -> Study:
    speed = TextSpeed(kv_tokens=kv_tokens)
    cluster = SimulatedCluster(replicas, RECENTLY_USED_S, speed=speed, warm_s=seconds / 2)
    traffic = TextTraffic(1.0, 10 * replicas, 1.1, seconds, pause_s=1.0)
    return Study(cluster, replace(traffic, rate=text_rate_for(load, replicas, speed, traffic)))


def run(engine: SimulatedTextEngine, now_s: float = 0.0) -> tuple[list[int], float]:
    """Run an engine until it is idle. Returns the ids in the order of their ends, and the time."""
    ended = []
    while (step_s := engine.start_batch(now_s)) is not None:
        now_s += step_s
        ended += [text.id for text in engine.finish_step(now_s)]
    return ended, now_s


def engine_with(kv_tokens: int) -> SimulatedTextEngine:
    return SimulatedTextEngine(4, 4, TextSpeed(kv_tokens=kv_tokens), RECENTLY_USED_S)


def text(id: int, tokens: int, answer: int, pages: range) -> SimulatedText:
    return SimulatedText(id, None, tokens, 0, 0.0, pages=tuple(pages), plain=tuple(pages), answer=answer, known=tokens)


def test_a_prompt_in_the_cache_is_not_computed_again() -> None:
    engine = engine_with(100_000)
    first, second = text(0, 640, 1, range(9)), text(1, 704, 5, range(11))
    engine.add_request(first)
    run(engine)
    took_s = engine.work_s
    engine.add_request(second)
    run(engine)
    assert (first.cached, second.cached) == (0, 9 * 64)
    assert engine.work_s < 1.4 * took_s
    assert engine.queued_tokens == engine.decodes == engine.open_requests == 0


def test_texts_end_after_as_many_steps_as_their_answers_have_tokens() -> None:
    engine = engine_with(100_000)
    for id, answer in ((0, 30), (1, 10), (2, 1)):
        engine.add_request(text(id, 64, answer, range(id * 10, id * 10 + 1)))
    ended, _ = run(engine)
    assert ended == [2, 1, 0]


def test_without_room_the_text_that_started_last_is_computed_again() -> None:
    engine = engine_with(64 * 20)
    for id in range(3):
        engine.add_request(text(id, 256, 400, range(id * 100, id * 100 + 10)))
    ended, _ = run(engine)
    assert sorted(ended) == [0, 1, 2]
    assert ended[0] == 0
    assert engine.preemptions > 0
    assert engine.pages.available == pytest.approx(20)


def test_pages_are_evicted_by_last_use() -> None:
    pages = SimulatedPages(3)
    for page, at_s in ((1, 0.0), (2, 1.0), (3, 2.0)):
        pages.use([page])
        pages.release([page], at_s)
    pages.use([1])
    pages.release([1], 3.0)
    pages.grow(1)
    assert pages.evict()
    assert [pages.match([page]) for page in (1, 2, 3)] == [1, 0, 1]
    assert pages.kept_since_s == 1.0
    pages.grow(9)
    assert not pages.evict()


def test_turns_of_a_conversation_extend_each_other() -> None:
    talks = Conversations(TextTraffic(10, 4, 1.1, 5.0))
    _, talk = next(talks.starts())
    one, other = (talks.next_turn(talk, id, 0, 0.0) for id in range(2))
    assert other.tokens > one.tokens + one.answer
    assert other.pages[: len(one.pages)] == one.pages
    assert one.ideal == 0
    assert other.ideal == len(one.pages) * 64


@pytest.mark.parametrize("rule", TEXT_RULES)
def test_every_text_is_answered_once_and_no_cache_beats_the_ideal_one(rule: str) -> None:
    outcome = study(4, seconds=4, kv_tokens=60_000).run(rule)
    assert isinstance(outcome, TextResult)
    row = outcome.row()
    assert row["unfinished"] == 0
    assert len(outcome.wait_s) == len(outcome.gap_s) > 100
    assert min(outcome.wait_s) > 0
    assert all(cached <= ideal for cached, ideal in zip(outcome.cached, outcome.ideal, strict=True))
    assert 0 < row["prefix hits"] <= row["of one cache"] <= 1


def rows(asked: Study, *names: str) -> list[dict[str, Any]]:
    outcomes: list[SimulationResult] = [asked.run(name) for name in names]
    return [outcome.row() for outcome in outcomes]


def test_ranklet_beats_rules_that_know_less() -> None:
    ours, least, adapters = rows(study(8, seconds=16), "ranklet", "least loaded", "adapter only")
    assert ours["of one cache"] >= 0.9
    assert ours["first_p99_ms"] <= 0.5 * least["first_p99_ms"]
    assert ours["prefix hits"] > adapters["prefix hits"] > least["prefix hits"]


def test_the_same_seed_gives_the_same_numbers_in_every_process(tmp_path: Path) -> None:
    words = ["simulate", "--text", "--replicas", "16", "--adapters", "160", "--seconds", "4", "--rules", "ranklet"]
    found = []
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        command = [sys.executable, "-m", "ranklet.cluster.command.cli", *words, "--workers", "1", "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        found.append(json.loads(out.read_text())["rows"])
    assert found[0] == found[1]


def test_the_command_simulates_texts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--text", "--replicas", "2", "--adapters", "8", "--seconds", "3", "--workers", "1"]
    assert main([*words, "--rules", "ranklet"]) == 0
    assert "2 replicas" in capsys.readouterr().out
    for wrong, said in (
        (["--rules", "round robin"], "--rules"), (["--turns", "0"], "--turns"), (["--flash-s", "3"], "--text"),
        (["--kv-tokens", "0"], "--kv-tokens"), (["--pause-s", "0"], "--pause-s"),
    ):  # fmt: skip
        assert main([*words, *wrong]) == 1
        assert said in capsys.readouterr().err
    assert main(["simulate", "--rules", "prefix only"]) == 1
    assert "without --text" in capsys.readouterr().err
