"""What a replica says of itself."""

import pytest

from ranklet.cluster.replica.state import ReplicaState
from ranklet.replicas.engine.stats import BatchRecord, HeldAdapters, LoadRecord


def batch(tokens: int, seconds: float) -> BatchRecord:
    return BatchRecord({"": 1}, {"": tokens}, "none", [], seconds)


def test_the_queue_is_what_arrived_and_is_not_settled() -> None:
    standing = ReplicaState("r", 4, 64)
    standing.arrived("g1", 100)
    standing.arrived("g2", 50)
    standing.settled(100)
    first, second = standing.now("g1"), standing.now("g3")
    assert (first.queued_tokens, first.done_tokens, first.received_tokens) == (50, 100, 100)
    assert second.received_tokens == 0
    assert second.number > first.number


def test_speed_is_that_of_large_batches() -> None:
    standing = ReplicaState("r", 4, 64)
    assert standing.wait_s() == 0
    for _ in range(100):
        standing.batch(batch(10, 0.01))
    standing.batch(batch(100_000, 1.0))
    standing.arrived("g", 50_000)
    assert standing.wait_s() == pytest.approx(0.5, rel=0.02)
    assert standing.level() > 0
    standing.settled(50_000)
    assert standing.level() == 0


def test_a_report_says_what_is_held_and_what_loads_take() -> None:
    standing = ReplicaState("r", 4, 64)
    standing.holds(HeldAdapters(("a",), ("b",), ("a", "c"), 2))
    before = standing.held_number
    standing.holds(HeldAdapters(("a",), ("b",), ("c", "a"), 2))
    assert standing.held_number == before, "another order is no news"
    for seconds in (0.1, 0.3):
        standing.load(LoadRecord("a", 16, "disk", seconds))
    standing.load(LoadRecord("x", 0, "disk", 99.0, "invalid_adapter"))
    standing.arrived("g", 7)
    report = standing.report(("g", "h"))
    held = report.holdings
    assert [sorted(names) for names in (held.resident, held.coming, held.hosted)] == [["a"], ["b"], ["a", "c"]]
    assert (held.slots, held.taken, held.pool_rank) == (4, 2, 64)
    assert held.from_disk_s == pytest.approx(0.2)
    assert held.from_host_s == 0
    assert (report.gateways, report.received_tokens) == (("g", "h"), {"g": 7})


def test_busy_is_a_share_of_the_time_since_it_was_asked() -> None:
    standing = ReplicaState("r", 4, 64)
    assert standing.busy() == 0
    standing.batch(batch(10, 1000.0))
    assert standing.busy() == 1.0
    assert standing.busy() == 0
