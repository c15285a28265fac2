"""The routing policy: what it weighs, and that no input makes it raise."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.routing import rendezvous
from ranklet.routing.affinity import SHORTLIST, Affinity, Policy
from ranklet.routing.fleet import SILENCE_S, Member
from ranklet.routing.report import Holdings, QueueLoad, StateReport
from tests.routing.given import NOW_S, RATE, load, routes_of, told

NAMES = [f"adapter-{number}" for number in range(2000)]
ODD_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.just(0))
NAME_SETS = st.frozensets(st.text(max_size=2))
REPORTS = st.builds(
    StateReport,
    replica=st.sampled_from(["r0", "r1", "r7", ""]),
    load=st.builds(QueueLoad, ODD_NUMBERS, ODD_NUMBERS, ODD_NUMBERS, ODD_NUMBERS, ODD_NUMBERS),
    holdings=st.builds(
        Holdings, st.integers(-3, 9), NAME_SETS, NAME_SETS, NAME_SETS,
        st.integers(-3, 9), st.integers(-3, 9), st.integers(-64, 64), st.floats(), st.floats(),
    ),
    gateways=st.lists(st.sampled_from(["me", "you", ""]), max_size=3).map(tuple),
    received_tokens=st.dictionaries(st.sampled_from(["me", "you"]), ODD_NUMBERS),
)  # fmt: skip


def home(adapter: str, count: int) -> int:
    return int(rendezvous.order(adapter, rendezvous.salted(range(count)))[0])


def best(routes: Affinity, adapter: str | None, tokens: int = 100, now_s: float = NOW_S, **more: Any) -> int:
    return routes.choose(adapter, tokens, now_s, **more).order[0]


# What it weighs


@given(st.sampled_from(NAMES), st.integers(1, 20))
def test_a_quiet_cluster_sends_an_adapter_home(adapter: str, count: int) -> None:
    routes = routes_of(count)
    assert [best(routes, adapter, now_s=NOW_S + 100 * i) for i in range(3)] == [home(adapter, count)] * 3


@given(st.sampled_from(NAMES), st.integers(0, 7))
def test_a_replica_that_holds_the_adapter_goes_first(adapter: str, holder: int) -> None:
    assert best(routes_of(8, resident={holder: [adapter]}), adapter) == holder


def test_it_leaves_home_only_where_that_pays() -> None:
    """Elsewhere costs the load from disk (0.15 s) and the scattering (0.1 s)."""
    at = home("a", 2)
    for queued, expected in ((0.2, at), (0.3, 1 - at)):
        routes = routes_of(2, {at: int(queued * RATE)}, {at: ["a"]})
        assert best(routes, "a") == expected


def test_a_replica_with_a_free_slot_is_better_than_one_where_another_must_leave() -> None:
    at = home("a", 4)
    routes = routes_of(4, resident={at: ["b", "c", "d", "e", "f", "g", "h", "i"]})
    assert best(routes, "a") != at


def test_the_host_cache_is_better_than_the_disk() -> None:
    routes = routes_of(4)
    away = (home("a", 4) + 1) % 4
    held = Holdings(2, frozenset(), frozenset(), frozenset({"a"}), 8, 0, 64, 0.5, 0.01)
    routes.told(StateReport(f"r{away}", load(2), held, ()), "me", NOW_S)
    for i in set(range(4)) - {away}:
        slow = Holdings(2, frozenset(), frozenset(), frozenset(), 8, 0, 64, 0.5, 0.01)
        routes.told(StateReport(f"r{i}", load(2), slow, ()), "me", NOW_S)
    assert best(routes, "a") == away


def test_an_adapter_larger_than_the_pool_goes_where_it_fits() -> None:
    routes = routes_of(4)
    for i in range(4):
        told(routes, i, number=2, pool_rank=128 if i == 3 else 64)
    assert best(routes, "a", rank=128) == 3
    alone = routes_of(2)
    assert best(alone, "a", rank=999) in (0, 1), "it is sent all the same: the replica says what is wrong with it"


def test_padding_is_work() -> None:
    routes = routes_of(2)
    at = home("a", 2)
    told(routes, at, number=2, pool_rank=256)
    told(routes, 1 - at, number=2, pool_rank=16, resident=["a"])
    told(routes, at, number=3, pool_rank=256, resident=["a"])
    assert best(routes, "a", tokens=30_000, rank=16) == 1 - at


@given(st.lists(st.integers(0, 5_000_000), min_size=2, max_size=30, unique=True))
def test_base_requests_go_to_the_least_loaded(queued: list[int]) -> None:
    policy = Policy(tie_s=0, share_s=0)
    routes = routes_of(len(queued), dict(enumerate(queued)), policy=policy)
    order = routes.choose(None, 100, NOW_S).order
    assert [queued[i] for i in order] == sorted(queued)[:SHORTLIST]


def test_base_requests_take_turns_among_equals() -> None:
    firsts = Counter(best(routes_of(3), None) for _ in range(300))
    assert min(firsts[i] for i in range(3)) > 50


def test_what_was_sent_counts_before_the_replica_has_said_so() -> None:
    routes = routes_of(2, resident={0: ["a"], 1: ["a"]})
    at = best(routes, "a")
    routes.fleet.sent(1, at, 40_000, NOW_S)
    assert best(routes, "a") == 1 - at
    routes.fleet.ended(1)
    assert best(routes, "a") == at


def test_a_request_that_ended_before_it_was_sent_is_no_load() -> None:
    """Its client has left while Ray was looking for a replica."""
    routes = routes_of(2)
    routes.fleet.ended(1)
    routes.fleet.sent(1, 0, 40_000, NOW_S)
    assert routes.fleet.where(1) is None
    assert routes.fleet.waits(NOW_S).max() == 0


def test_a_queue_drains_while_nothing_is_heard() -> None:
    at = home("a", 2)
    routes = routes_of(2, {at: int(3 * RATE)}, {0: ["a"], 1: ["a"]})
    assert best(routes, "a") == 1 - at
    assert best(routes, "a", now_s=NOW_S + 3) == at


def test_the_replica_that_failed_comes_last() -> None:
    routes = routes_of(5, resident={0: ["a"]})
    order = routes.choose("a", 100, NOW_S, avoid="r0").order
    assert order[-1] == 0
    assert len(order) == 5
    assert routes.choose("a", 100, NOW_S, avoid="unknown").order[0] == 0


def test_a_silent_replica_that_owes_answers_is_shunned_until_it_speaks() -> None:
    routes = routes_of(2, resident={0: ["a"]})
    routes.fleet.sent(1, 0, 10, NOW_S)
    assert best(routes, "a", now_s=NOW_S + SILENCE_S - 1) == 0
    assert routes.fleet.hung(NOW_S + SILENCE_S - 1) == []
    late_s = NOW_S + SILENCE_S + 1
    assert best(routes, "a", now_s=late_s) == 1
    assert routes.fleet.hung(late_s) == ["r0"]
    told(routes, 0, 10, ["a"], number=2, now_s=late_s)
    assert best(routes, "a", now_s=late_s + 0.5) == 0


# Homes


def hammer(routes: Affinity, adapter: str, per_s: int, seconds: float, start_s: float, tokens: int = 1000) -> float:
    """Requests at a steady rate, each answered at once; the time after."""
    for i in range(int(per_s * seconds)):
        routes.choose(adapter, tokens, start_s + i / per_s)
    return start_s + seconds


def test_a_hot_adapter_gets_homes_at_once_and_loses_them_slowly() -> None:
    routes = routes_of(32, policy=Policy(load_of_home=0.5, load_of_crowded_home=0.5))
    now_s = hammer(routes, "a", 400, 1.5, NOW_S)  # of 4 replicas' rate
    demand = routes._demands["a"]
    assert 5 <= demand.homes <= 10
    grown = demand.homes
    now_s = hammer(routes, "a", 1, 3, now_s + 2)
    assert demand.homes >= grown - 2
    hammer(routes, "a", 1, 300, now_s)
    assert demand.homes == 1


def test_new_homes_are_told_to_load() -> None:
    routes = routes_of(16, resident={home("a", 16): ["a"]})
    ordered: set[str] = set()
    for i in range(1000):
        ordered.update(routes.choose("a", 1000, NOW_S + i / 400).prefetch)
    assert len(ordered) >= 4
    assert f"r{home('a', 16)}" not in ordered


@given(st.sampled_from(NAMES), st.integers(2, 64))
def test_a_cold_adapter_is_never_scattered(adapter: str, count: int) -> None:
    routes = routes_of(count)
    chosen = {best(routes, adapter, now_s=NOW_S + 7 * i) for i in range(40)}
    assert chosen == {home(adapter, count)}
    assert routes._demands[adapter].homes == 1


def test_a_wait_brings_a_copy_to_a_free_slot() -> None:
    at = home("a", 4)
    routes = routes_of(4, {at: int(0.2 * RATE)}, {at: ["a"]})
    routes.choose("a", 100, NOW_S)
    choice = routes.choose("a", 100, NOW_S + 0.01)
    assert choice.order[0] == at
    assert len(choice.prefetch) == 1
    assert routes.choose("a", 100, NOW_S + 0.02).prefetch == (), "not again at once"


def test_routers_share_the_homes_of_a_hot_adapter() -> None:
    """Eight routers that hear nothing of each other: none of the homes gets much more than its part."""
    sent: Counter[int] = Counter()
    for turn in range(8):
        routes = routes_of(16, resident={i: ["a"] for i in range(16)})
        routes.fleet.share(8, turn)
        for i in range(400):
            now_s = NOW_S + i / 100
            chosen = best(routes, "a", 1000, now_s)
            routes.fleet.sent(i, chosen, 1000, now_s)
            routes.fleet.ended(i - 2)
            sent[chosen] += i >= 200
    assert len(sent) == 16
    assert max(sent.values()) < 3 * sum(sent.values()) / 16


# Whatever comes


@given(
    st.lists(REPORTS, max_size=8), st.one_of(st.none(), st.text(max_size=3), st.just("\ud800")),
    st.integers(-5, 2**60), st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=4), st.integers(-5, 2**40),
)  # fmt: skip
def test_nonsense_never_makes_it_raise(
    reports: list[StateReport], adapter: str | None, tokens: int, times: list[float], rank: int
) -> None:
    """Clocks that jump, numbers that cannot be: every choice names each replica of the short list once."""
    routes = routes_of(3)
    for now_s in times:
        for report in reports:
            routes.told(report, "me", now_s, now_s)
        order = routes.choose(adapter, tokens, now_s, rank=rank).order
        assert sorted(order) == [0, 1, 2]
        routes.fleet.sent(1, order[0], max(tokens, 0), now_s)
        assert all(math.isfinite(wait) for wait in routes.fleet.waits(now_s))


def test_a_replica_that_talks_nonsense_is_not_believed() -> None:
    routes = routes_of(2, resident={0: ["a"]})
    for wrong in (load(2, -5), load(2, 1 << 60), load(2, rate=math.nan), load(2, rate=-1.0)):
        assert not routes.fleet.hear("r0", wrong, NOW_S)
    assert routes.fleet.nonsense == 4
    assert best(routes, "a") == 0


def test_news_that_comes_late_is_not_believed() -> None:
    routes = routes_of(2, resident={0: ["a"]})
    told(routes, 0, 0, ["a"], number=9)
    told(routes, 0, 9_000_000, [], number=8)
    assert best(routes, "a") == 0


def test_a_lost_replica_moves_only_its_own_adapters() -> None:
    routes = routes_of(8)
    before = {name: best(routes, name) for name in NAMES[:300]}
    routes.fleet.join([Member(f"r{i}", i) for i in range(8) if i != 3], NOW_S)
    after = {name: routes.fleet.members[best(routes, name)].rank for name in NAMES[:300]}
    moved = {name for name in before if after[name] != before[name]}
    assert moved == {name for name, rank in before.items() if rank == 3}


def test_a_replacement_gets_the_adapters_of_its_rank() -> None:
    routes = routes_of(4)
    routes.fleet.join([Member("new" if i == 2 else f"r{i}", i) for i in range(4)], NOW_S)
    assert {name: best(routes, name) for name in NAMES[:100]} == {name: home(name, 4) for name in NAMES[:100]}


def test_what_is_known_of_those_that_stay_survives_a_change() -> None:
    routes = routes_of(4, {1: 5_000_000}, {1: ["a"]})
    routes.fleet.sent(7, 1, 1000, NOW_S)
    routes.fleet.join([Member(f"r{i}", i) for i in (3, 1)], NOW_S)
    waits = routes.fleet.waits(NOW_S)
    assert waits[1] > 40 > waits[0]
    assert routes.fleet.tenancy.places("a") == {1: True}
    assert routes.fleet.where(7) == "r1"


def test_no_replicas_give_an_empty_order() -> None:
    assert Affinity().choose("a", 10, NOW_S).order == ()


def test_homes_are_spread_evenly() -> None:
    homes = Counter(home(name, 8) for name in NAMES)
    assert len(homes) == 8
    assert max(homes.values()) < 1.3 * len(NAMES) / 8


def test_the_order_does_not_change_between_releases() -> None:
    """Written down when it was first made: gateways of two releases must agree on homes during an update."""
    salts = rendezvous.salted(range(8))
    assert [int(rendezvous.order(name, salts)[0]) for name in NAMES[:10]] == [5, 2, 6, 2, 2, 0, 1, 2, 1, 6]


@pytest.mark.parametrize(
    ("field", "value"),
    [("scatter_s", -1), ("relief_s", math.nan), ("load_of_home", 0), ("share_s", math.inf), ("tie_s", "much")],
)
def test_a_policy_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Policy(**{field: value})


@pytest.mark.parametrize("rate", [5e-324, 1e-9, -1.0, 1e300, math.inf, math.nan])
def test_a_rate_that_cannot_be_is_not_believed(rate: float) -> None:
    routes = routes_of(2)
    before = routes.fleet.rate()
    assert not routes.fleet.hear("r0", QueueLoad(10**6, 5, rate, 0, 0), NOW_S)
    assert routes.fleet.rate() == before
    routes.fleet.sent(1, 0, 2**40, NOW_S)
