"""The routing policy: properties that must hold for any replicas, loads and adapters."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.routing.affinity import Policy, prefer, rendezvous
from ranklet.routing.view import ReplicaView

POLICY = Policy()
NAMES = [f"adapter-{number}" for number in range(2000)]


def fleet(*loads: int, resident: dict[int, set[str]] | None = None) -> list[ReplicaView]:
    """Replicas of ranks 0, 1, ... with these loads."""
    held = resident or {}
    return [ReplicaView(f"r{rank}", rank, load, frozenset(held.get(rank, set()))) for rank, load in enumerate(loads)]


def views(max_load: int = 10_000) -> st.SearchStrategy[list[ReplicaView]]:
    one = st.builds(
        ReplicaView,
        id=st.text(max_size=4),
        rank=st.integers(),
        in_flight=st.integers(-5, max_load),
        resident=st.frozensets(st.sampled_from(["a", "b", "c"])),
    )
    return st.lists(one, max_size=12)


@given(views(), st.one_of(st.none(), st.text(), st.sampled_from(["a", "b", "\ud800"])), st.integers())
def test_any_input_gives_every_replica_once(replicas: list[ReplicaView], adapter: str | None, turn: int) -> None:
    assert sorted(prefer(replicas, adapter, POLICY, turn)) == list(range(len(replicas)))


@given(st.lists(st.integers(0, POLICY.free_in_flight - 1), min_size=2, max_size=16), st.sampled_from(NAMES))
def test_at_low_load_an_adapter_stays_at_home(loads: list[int], adapter: str) -> None:
    at_rest = prefer(fleet(*[0] * len(loads)), adapter, POLICY)
    assert prefer(fleet(*loads), adapter, POLICY) == at_rest


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=16), st.sampled_from(NAMES), st.floats(1.01, 4))
def test_the_first_choice_is_below_the_bound(loads: list[int], adapter: str, balance: float) -> None:
    policy = replace(POLICY, balance=balance)
    first = prefer(fleet(*loads), adapter, policy)[0]
    assert loads[first] < policy.bound(sum(loads), len(loads))


@given(st.lists(st.integers(), min_size=3, max_size=12, unique=True), st.sampled_from(NAMES), st.data())
def test_a_lost_replica_moves_only_its_own_adapters(ranks: list[int], adapter: str, data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, len(ranks) - 1))
    before = [ranks[index] for index in rendezvous(adapter, tuple(ranks))]
    left = [rank for rank in ranks if rank != ranks[gone]]
    after = [left[index] for index in rendezvous(adapter, tuple(left))]
    assert after == [rank for rank in before if rank != ranks[gone]]


@given(st.permutations(range(8)), st.sampled_from(NAMES))
def test_the_order_in_which_replicas_are_listed_does_not_matter(ranks: list[int], adapter: str) -> None:
    listed = [ranks[index] for index in rendezvous(adapter, tuple(ranks))]
    assert listed == list(rendezvous(adapter, tuple(range(8))))


@given(st.sampled_from(NAMES), st.integers(0, 7))
def test_a_replica_that_holds_the_adapter_goes_first(adapter: str, holder: int) -> None:
    replicas = fleet(*[3] * 8, resident={holder: {adapter}})
    assert prefer(replicas, adapter, POLICY)[0] == holder


@given(st.sampled_from(NAMES))
def test_an_overloaded_holder_is_passed_over(adapter: str) -> None:
    home = prefer(fleet(*[0] * 4), adapter, POLICY)[0]
    loads = [10] * 4
    loads[home] = 200
    order = prefer(fleet(*loads, resident={home: {adapter}}), adapter, POLICY)
    assert order[0] != home
    assert order[-1] == home


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=16), st.integers())
def test_base_requests_go_to_the_least_loaded(loads: list[int], turn: int) -> None:
    order = prefer(fleet(*loads), None, POLICY, turn)
    assert [loads[index] for index in order] == sorted(loads)


def test_base_requests_take_turns_among_equals() -> None:
    firsts = Counter(prefer(fleet(0, 0, 0), None, POLICY, turn)[0] for turn in range(30))
    assert firsts == {0: 10, 1: 10, 2: 10}


def test_homes_are_spread_evenly() -> None:
    homes = Counter(prefer(fleet(*[0] * 8), name, POLICY)[0] for name in NAMES)
    assert len(homes) == 8
    assert max(homes.values()) < 1.3 * len(NAMES) / 8


def test_every_process_agrees_on_homes() -> None:
    code = (
        "from ranklet.routing.affinity import rendezvous\n"
        "print([rendezvous(f'adapter-{number}', tuple(range(8))) for number in range(50)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{[rendezvous(name, tuple(range(8))) for name in NAMES[:50]]}\n"}


@pytest.mark.parametrize(("field", "value"), [("balance", 0.5), ("balance", float("nan")), ("free_in_flight", 0)])
def test_a_policy_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Policy(**{field: value})  # type: ignore[arg-type]
