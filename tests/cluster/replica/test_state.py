"""The state of a replica follows its calls and its engine's records."""

import pytest

from ranklet.cluster.autoscaling import BUSY, WAIT_S, wanted_replicas
from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.adapters.reference import HeldAdapters, LoadRecord
from ranklet.replicas.engine.stats import BatchRecord, CacheRoom


def batch(tokens: int, seconds: float) -> BatchRecord:
    return BatchRecord({"": 1}, {"": tokens}, "none", [], seconds)


def test_the_queue_holds_calls_that_have_arrived_and_not_finished() -> None:
    state = ReplicaState("r", 4, 64, wall_clock=lambda: 12.5)
    state.call_arrived("g1", 100)
    state.call_arrived("g2", 50)
    state.call_finished(100)
    first, second = state.load_for("g1"), state.load_for("g3")
    assert (first.queued_work, first.done_work, first.received_work, first.at_s) == (50, 100, 100, 12.5)
    assert second.received_work == 0
    assert second.number > first.number


def test_large_batches_determine_the_speed() -> None:
    state = ReplicaState("r", 4, 64)
    assert state.wait_s() == 0
    for _ in range(100):
        state.batch(batch(10, 0.01))
    state.batch(batch(100_000, 1.0))
    state.call_arrived("g", 50_000)
    assert state.wait_s() == pytest.approx(0.5, rel=0.02)
    assert state.level() > 0
    state.call_finished(50_000)
    assert state.level() == 0


def test_a_report_contains_the_held_adapters_and_the_time_of_loads() -> None:
    state = ReplicaState("r", 4, 64)
    state.holdings_changed(HeldAdapters(("a",), ("b",), ("a", "c"), 2))
    for seconds in (0.1, 0.3):
        state.load(LoadRecord("a", 16, "disk", seconds))
    state.load(LoadRecord("x", 0, "disk", 99.0, "invalid_adapter"))
    state.call_arrived("g", 7)
    report = state.report(("g", "h"))
    held = report.holdings
    assert [sorted(names) for names in (held.resident, held.loading, held.hosted)] == [["a"], ["b"], ["a", "c"]]
    assert (held.slots, held.used_slots, held.pool_rank) == (4, 2, 64)
    assert held.from_disk_s == pytest.approx(0.2)
    assert held.from_host_s == 0
    assert (report.gateways, report.received_work) == (("g", "h"), {"g": 7})


def test_subscribers_are_called_when_the_held_adapters_or_the_level_of_the_wait_change() -> None:
    state, calls = ReplicaState("r", 4, 64), []
    state.subscribe(lambda: calls.append((state.holdings_number, state.level())))
    state.holdings_changed(HeldAdapters(("a", "b"), (), (), 2))
    state.holdings_changed(HeldAdapters(("b", "a"), (), (), 2))  # only the order of use differs
    assert calls == [(1, 0)]
    state.batch(batch(1000, 1.0))
    state.call_arrived("g", 10)
    assert calls == [(1, 0)], "a wait of 10 ms is still level 0"
    state.call_arrived("g", 990)
    level = state.level()
    assert level > 0
    state.call_finished(1000)
    assert calls == [(1, 0), (1, level), (1, 0)]


def test_busy_is_the_share_of_the_time_since_the_last_question() -> None:
    now_s = 0.5  # a machine that has just booted
    state = ReplicaState("r", 4, 64, clock=lambda: now_s)
    assert state.busy() == 0
    now_s += 10
    state.batch(batch(10, 4.0))
    assert state.busy() == pytest.approx(0.4)
    now_s += 10
    assert state.busy() == 0
    state.batch(batch(10, 1000.0))
    now_s += 1
    assert state.busy() == 1.0


def test_few_texts_do_not_keep_a_replica_busy() -> None:
    now_s = 0.0
    state = ReplicaState("r", 4, 64, clock=lambda: now_s, most_texts=100)
    for texts, busy in ((1, 0.02), (25, 0.5), (50, 1.0), (100, 1.0)):
        now_s += 10
        state.batch(BatchRecord({}, {}, "none", [], 10.0, {"": texts}))
        assert state.busy() == pytest.approx(busy)


def test_the_time_to_the_first_token_is_that_since_the_last_question() -> None:
    state = ReplicaState("r", 4, 64)
    assert state.first_token_s() is None
    state.first_token_came(1.0)
    state.first_token_came(2.0)
    assert state.first_token_s() == pytest.approx(1.5)
    assert state.first_token_s() is None


def test_texts_that_run_are_no_wait() -> None:
    state = ReplicaState("r", 4, 64)
    state.batch(BatchRecord({}, {"": 1000}, "none", [], 0.01, {}, CacheRoom(6400, 12.0)))
    state.batch(BatchRecord({}, {}, "none", [], 0.01, {"": 100}, CacheRoom(640, 12.0)))
    for _ in range(201):
        state.call_arrived("g", 1000, texts=1)
    assert state.wait_s() == pytest.approx(2.01)
    for _ in range(201):
        state.text_begun(1000, 0, [])
    state.text_finished(200, 450, 2.0, [])
    assert state.load_for("g").texts == 200
    assert state.wait_s() == 0
    assert wanted_replicas({BUSY: {0: 0.7}, WAIT_S: {0: state.wait_s()}}, current=1, target=1) < 1
    level = state.level()
    assert level > 0, "routers are told of them"
    state.call_arrived("g", 50_000)
    assert state.wait_s() == pytest.approx(0.5)
    assert wanted_replicas({BUSY: {0: 0.7}, WAIT_S: {0: 2 * state.wait_s()}}, current=1, target=1) == 2


def test_texts_count_by_their_prompts_until_they_begin_and_by_their_number_then() -> None:
    state = ReplicaState("r", 4, 64)
    state.batch(BatchRecord({}, {"": 1000}, "none", [], 0.01, {}, CacheRoom(6400, 12.0)))
    state.batch(BatchRecord({}, {}, "none", [], 0.01, {"": 100}, CacheRoom(640, 12.0)))
    state.call_arrived("g", 1000, texts=1)
    assert (state.load_for("g").queued_work, state.load_for("g").received_work) == (1000, 1000)
    state.text_begun(1000, 750, [5, 6])
    load = state.load_for("g")
    assert (load.queued_work, load.texts, load.text_work, load.free_tokens) == (0, 1, 0, 640)
    assert state.has_news
    state.text_finished(200, 450, 2.0, [7])
    state.call_arrived("g", 100, texts=1)
    load = state.load_for("g")
    assert load.queued_work == pytest.approx(25), "as much of the next prompt is not cached"
    assert load.texts == 0
    assert load.text_work == pytest.approx(200 * 10)
    state.texts_dropped(1, 100)
    news = state.report(()).prefixes
    assert news is not None
    assert (news.pages, news.kept_s) == ((5, 6, 7), 12.0)
    assert not state.has_news


def test_texts_beyond_those_that_may_run_at_once_are_a_wait_and_leave_no_place() -> None:
    state = ReplicaState("r", 4, 64, most_texts=4)
    state.batch(BatchRecord({}, {"": 1000}, "none", [], 0.01, {}, CacheRoom(6400, 12.0)))
    state.call_arrived("g", 10, texts=4)
    assert state.load_for("g").free_texts == 0
    for _ in range(4):
        state.text_begun(0, 0, ())
    state.text_finished(200, 450, 2.0, ())
    assert (state.load_for("g").free_texts, state.load_for("g").ended_per_s) == (1, 2)
    state.call_arrived("g", 0, texts=6)
    assert state.load_for("g").free_texts == -5
    assert state.wait_s() == pytest.approx(2.5, abs=0.001)
    state.texts_dropped(6, 0)
    assert state.load_for("g").free_texts == 1
    assert state.wait_s() == pytest.approx(0, abs=0.001)


def test_waiting_prompts_take_room_of_the_cache() -> None:
    state = ReplicaState("r", 4, 64)
    state.batch(BatchRecord({}, {"": 1000}, "none", [], 0.01, {}, CacheRoom(6400, 12.0)))
    state.call_arrived("g", 500, texts=1)
    state.text_begun(500, 0, ())
    state.call_arrived("g", 7000, texts=1)
    assert state.load_for("g").free_tokens == -600
    prompt_s = state.wait_s()
    state.call_arrived("g", 0, texts=1)
    state.text_begun(0, 0, ())
    state.text_finished(10, 300, 1.0, ())
    assert state.load_for("g").freed_per_s == 300
    assert state.wait_s() - prompt_s == pytest.approx(2.0), "until the texts that run have freed as much"


def test_a_replica_without_texts_tells_nothing_of_them() -> None:
    state = ReplicaState("r", 4, 64)
    state.batch(batch(10, 0.01))
    assert state.report(()).prefixes is None
    assert state.load_for("g").text_work == 0


def test_texts_that_are_cut_short_do_not_count_for_the_length_of_texts() -> None:
    state = ReplicaState("r", 4, 64)
    state.call_arrived("g", 10, texts=1)
    state.text_begun(10, 0, ())
    state.text_finished(0, 0, 0.0, ())
    load = state.load_for("g")
    assert (load.texts, load.queued_work, load.freed_per_s) == (0, 0, 0)
