"""The choices of the routing policy, and that no input makes it raise."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ranklet.routing import rendezvous
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import RoutingHint
from ranklet.routing.policy import REPLICA_SILENCE_LIMIT_S, SHORTLIST, Policy
from ranklet.routing.report import Holdings, QueueLoad, StateReport
from tests.routing.given import GATEWAY, RATE, ManualAffinity, affinity_with, load, report

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
    gateways=st.lists(st.sampled_from([GATEWAY, "you", ""]), max_size=3).map(tuple),
    received_work=st.dictionaries(st.sampled_from([GATEWAY, "you"]), ODD_NUMBERS),
)  # fmt: skip


def home(adapter: str, count: int) -> int:
    return int(rendezvous.order(adapter, rendezvous.salted(range(count)))[0])


def best(
    affinity: ManualAffinity, adapter: str | None, work: float = 100, *, after_s: float = 0.0, rank: int = 0
) -> int:
    """The best replica for a request that comes this much later."""
    affinity.clock.now_s += after_s
    return affinity.choose(adapter, work, rank=rank).order[0]


# Costs


@given(st.sampled_from(NAMES), st.integers(1, 20))
def test_without_load_an_adapter_goes_to_its_first_home(adapter: str, count: int) -> None:
    affinity = affinity_with(count)
    assert [best(affinity, adapter, after_s=100) for _ in range(3)] == [home(adapter, count)] * 3


@given(st.sampled_from(NAMES), st.integers(0, 7))
def test_a_replica_that_holds_the_adapter_is_preferred(adapter: str, holder: int) -> None:
    assert best(affinity_with(8, resident={holder: [adapter]}), adapter) == holder


def test_an_adapter_leaves_its_home_only_if_the_wait_costs_more() -> None:
    """Elsewhere costs the load from disk (0.15 s) and an extra home (0.1 s)."""
    at = home("a", 2)
    for queued_s, expected in ((0.2, at), (0.3, 1 - at)):
        affinity = affinity_with(2, {at: queued_s * RATE}, {at: ["a"]})
        assert best(affinity, "a") == expected


def test_a_free_slot_is_preferred_to_an_eviction() -> None:
    at = home("a", 4)
    affinity = affinity_with(4, resident={at: ["b", "c", "d", "e", "f", "g", "h", "i"]})
    assert best(affinity, "a") != at


def test_a_load_from_host_memory_is_preferred_to_a_load_from_disk() -> None:
    affinity = affinity_with(4)
    away = (home("a", 4) + 1) % 4
    for i in range(4):
        hosted = frozenset({"a"} if i == away else ())
        held = Holdings(2, frozenset(), frozenset(), hosted, 8, 0, 64, 0.5, 0.01)
        affinity.on_report(StateReport(f"r{i}", load(2), held, ()), GATEWAY)
    assert best(affinity, "a") == away


def test_an_adapter_goes_to_a_pool_that_can_hold_its_rank() -> None:
    affinity = affinity_with(4)
    for i in range(4):
        report(affinity, i, number=2, pool_rank=128 if i == 3 else 64)
    assert best(affinity, "a", rank=128) == 3


def test_an_adapter_that_no_pool_can_hold_is_sent_to_a_replica_that_refuses_it() -> None:
    assert best(affinity_with(2), "a", rank=999) in (0, 1)


def test_padding_to_a_larger_pool_costs_work() -> None:
    affinity = affinity_with(2)
    at = home("a", 2)
    report(affinity, at, number=2, pool_rank=256, resident=["a"])
    report(affinity, 1 - at, number=2, pool_rank=16, resident=["a"])
    assert best(affinity, "a", work=30_000, rank=16) == 1 - at


@given(st.lists(st.integers(0, 5_000_000), min_size=2, max_size=30, unique=True))
def test_base_requests_go_to_the_least_loaded(queued: list[int]) -> None:
    policy = Policy(tie_window_s=0, other_router_cost_s=0)
    order = affinity_with(len(queued), dict(enumerate(queued)), policy=policy).choose(None, 100).order
    assert [queued[i] for i in order] == sorted(queued)[:SHORTLIST]


def test_base_requests_are_spread_over_equal_replicas() -> None:
    affinity = affinity_with(3)
    firsts = Counter(best(affinity, None) for _ in range(300))
    assert min(firsts[i] for i in range(3)) > 50


def test_routed_work_counts_before_the_replica_reports_it() -> None:
    affinity = affinity_with(2, resident={0: ["a"], 1: ["a"]})
    at = affinity.route(RoutingHint(1, "a", 40_000)).order[0]
    assert best(affinity, "a") == 1 - at
    affinity.complete(1, f"r{at}")
    assert best(affinity, "a") == at


def test_a_request_that_ended_before_it_was_sent_adds_no_wait() -> None:
    """Its client has left while Ray was looking for a replica."""
    affinity = affinity_with(2)
    affinity.complete(1)
    affinity.route(RoutingHint(1, None, 40_000))
    assert affinity.replica_of(1) is None
    assert max(affinity.waits()) == 0


def test_an_expected_wait_shrinks_between_reports() -> None:
    at = home("a", 2)
    affinity = affinity_with(2, {at: 3 * RATE}, {0: ["a"], 1: ["a"]})
    assert best(affinity, "a") == 1 - at
    assert best(affinity, "a", after_s=3) == at


def test_the_replica_that_failed_comes_last() -> None:
    affinity = affinity_with(5, resident={0: ["a"]})
    order = affinity.choose("a", 100, avoid="r0").order
    assert order[-1] == 0
    assert len(order) == 5
    assert affinity.choose("a", 100, avoid="unknown").order[0] == 0


def test_a_silent_replica_that_owes_answers_is_avoided_until_its_next_report() -> None:
    affinity = affinity_with(2, resident={0: ["a"]})
    affinity.route(RoutingHint(1, "a", 10))
    assert best(affinity, "a", after_s=REPLICA_SILENCE_LIMIT_S - 1) == 0
    assert affinity.stranded([1]) == {}
    assert best(affinity, "a", after_s=2) == 1
    assert affinity.stranded([1, 2]) == {1: "r0"}
    report(affinity, 0, 10, ["a"], number=2)
    assert best(affinity, "a", after_s=0.5) == 0
    assert affinity.stranded([1]) == {}


def test_without_replicas_requests_are_stranded() -> None:
    affinity = ManualAffinity()
    assert affinity.choose("a", 10).order == ()
    assert affinity.stranded([1, 2]) == {1: None, 2: None}
    affinity.set_members([Member("r0", 0)])
    assert affinity.stranded([1, 2]) == {}


# Homes


def test_new_homes_are_prefetched() -> None:
    affinity = affinity_with(16, resident={home("a", 16): ["a"]})
    prefetched: set[str] = set()
    for _ in range(1000):
        prefetched.update(affinity.choose("a", 1000).prefetch)
        affinity.clock.now_s += 1 / 400
    assert len(prefetched) >= 4
    assert f"r{home('a', 16)}" not in prefetched


@given(st.sampled_from(NAMES), st.integers(2, 64))
def test_an_adapter_with_little_traffic_stays_at_one_home(adapter: str, count: int) -> None:
    affinity = affinity_with(count)
    for _ in range(40):
        choice = affinity.choose(adapter, 100)
        assert (choice.order[0], choice.prefetch) == (home(adapter, count), ())
        affinity.clock.now_s += 7


def test_a_wait_leads_to_one_prefetch_to_a_free_slot() -> None:
    at = home("a", 4)
    affinity = affinity_with(4, {at: 0.2 * RATE}, {at: ["a"]})
    affinity.choose("a", 100)
    affinity.clock.now_s += 0.01
    choice = affinity.choose("a", 100)
    assert choice.order[0] == at
    assert len(choice.prefetch) == 1
    affinity.clock.now_s += 0.01
    assert affinity.choose("a", 100).prefetch == (), "a second prefetch follows only after prefetch_interval_s"


def test_routers_without_reports_spread_a_hot_adapter_over_all_its_homes() -> None:
    sent: Counter[int] = Counter()
    for gateway in range(8):
        affinity = affinity_with(16, resident={i: ["a"] for i in range(16)})
        affinity.set_gateways(8, gateway)
        for i in range(400):
            chosen = affinity.route(RoutingHint(i, "a", 1000)).order[0]
            affinity.complete(i - 2, f"r{chosen}")
            sent[chosen] += i >= 200
            affinity.clock.now_s += 0.01
    assert len(sent) == 16
    assert max(sent.values()) < 3 * sum(sent.values()) / 16


# Any input


@given(
    st.lists(REPORTS, max_size=8), st.one_of(st.none(), st.text(max_size=3), st.just("\ud800")),
    st.integers(-5, 2**60), st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=4), st.integers(-5, 2**40),
)  # fmt: skip
def test_impossible_input_never_raises(
    reports: list[StateReport], adapter: str | None, work: int, times_s: list[float], rank: int
) -> None:
    """With clocks that jump and impossible numbers, every choice names each replica of the shortlist once."""
    affinity = affinity_with(3)
    for now_s in times_s:
        affinity.clock.now_s = now_s
        for each in reports:
            affinity.on_report(each, GATEWAY, now_s)
        assert sorted(affinity.choose(adapter, work, rank=rank).order) == [0, 1, 2]
        affinity.route(RoutingHint(1, adapter, max(work, 0)))
        assert all(math.isfinite(wait_s) for wait_s in affinity.waits())


def test_a_report_that_arrives_out_of_order_is_ignored() -> None:
    affinity = affinity_with(2, resident={0: ["a"]})
    report(affinity, 0, 0, ["a"], number=9)
    report(affinity, 0, 9_000_000, [], number=8)
    assert best(affinity, "a") == 0


# Membership


def test_a_lost_replica_moves_only_its_own_adapters() -> None:
    affinity = affinity_with(8)
    before = {name: best(affinity, name) for name in NAMES[:300]}
    stay = [i for i in range(8) if i != 3]
    affinity.set_members([Member(f"r{i}", i) for i in stay])
    after = {name: stay[best(affinity, name)] for name in NAMES[:300]}
    moved = {name for name in before if after[name] != before[name]}
    assert moved == {name for name, rank in before.items() if rank == 3}


def test_a_replacement_gets_the_adapters_of_its_rank() -> None:
    affinity = affinity_with(4)
    affinity.set_members([Member("new" if i == 2 else f"r{i}", i) for i in range(4)])
    assert {name: best(affinity, name) for name in NAMES[:100]} == {name: home(name, 4) for name in NAMES[:100]}


def test_replicas_that_stay_keep_their_state() -> None:
    affinity = affinity_with(4, {1: 5_000_000, 3: 0}, {1: ["a"]})
    affinity.route(RoutingHint(7, "a", 1000))
    at = affinity.replica_of(7)
    affinity.set_members([Member(f"r{i}", i) for i in (3, 1, 0, 2)])
    waits = affinity.waits()
    assert waits[1] > 40 > waits[0]
    assert affinity.fleet.placement.places("a")[1]
    assert affinity.replica_of(7) == at
    [view] = [view for view in affinity.views() if view.id == "r1"]
    assert view.queued_work == 5_000_000
    assert view.holdings is not None
    assert view.holdings.resident == {"a"}


def test_a_router_without_replicas_has_an_empty_order() -> None:
    assert Affinity().choose("a", 10).order == ()


# Rendezvous order


def test_homes_are_spread_evenly() -> None:
    homes = Counter(home(name, 8) for name in NAMES)
    assert len(homes) == 8
    assert max(homes.values()) < 1.3 * len(NAMES) / 8


def test_the_order_does_not_change_between_releases() -> None:
    """Gateways of two releases must agree on homes during an update."""
    salts = rendezvous.salted(range(8))
    assert [int(rendezvous.order(name, salts)[0]) for name in NAMES[:10]] == [5, 2, 6, 2, 2, 0, 1, 2, 1, 6]
