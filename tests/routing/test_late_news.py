"""Texts find their replica by late news, by wrong news and without any."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import RoutingHint, TextHint
from ranklet.routing.policy import SHORTLIST
from ranklet.routing.report import PrefixNews, QueueLoad, StateReport
from tests.routing.given import GATEWAY, RATE, ManualAffinity, affinity_with, holdings, load

SYSTEM = tuple(range(100, 110))
GATEWAYS = 4
REPLICAS = 8


def tell(
    affinity: Affinity, i: int, queue: QueueLoad, age_s: float = 0.0, pages: tuple[int, ...] = (), *, number: int = 1
) -> None:
    held = holdings(["a"], number=number)
    affinity.on_report(StateReport(f"r{i}", queue, held, (), {}, PrefixNews(pages)), GATEWAY, age_s)


def chosen(affinity: Affinity, times: int = 40) -> set[int]:
    return {affinity.choose(None, 100).order[0] for _ in range(times)}


def running(number: int, texts: int) -> QueueLoad:
    return replace(load(number), texts=texts, text_work=0.02 * RATE)


def gateways(age_s: float) -> list[ManualAffinity]:
    """Return routers to which an adapter's system prompt is known everywhere, by reports of this age."""
    made = []
    for gateway in range(GATEWAYS):
        affinity = affinity_with(REPLICAS, None, {i: ["a"] for i in range(REPLICAS)})
        affinity.set_gateways(GATEWAYS, gateway)
        for number in range(2, 12):
            for i in range(REPLICAS):
                tell(affinity, i, running(number, 1), age_s, SYSTEM[-1:])
        for _ in range(30):
            affinity.choose("a", 5000)  # until all replicas are its homes
        made.append(affinity)
    return made


def conversation(number: int, turns: int = 1) -> TextHint:
    return TextHint((*SYSTEM, *(number * 7919 + page for page in range(1000, 1000 + 3 * turns))))


def test_what_reports_say_of_running_texts_counts_less_with_their_age() -> None:
    affinity = affinity_with(2)
    for i, texts in enumerate((50, 10)):
        tell(affinity, i, running(2, texts))
    affinity.clock.now_s += 0.9
    assert chosen(affinity) == {1}, "nothing has changed, or there would be a report"
    affinity.clock.now_s += 3
    assert chosen(affinity) == {0, 1}, "all of these texts have ended"
    for i, texts in enumerate((50, 10)):
        tell(affinity, i, running(3, texts), age_s=3.0)
    assert chosen(affinity) == {0, 1}
    for i, texts in enumerate((50, 10)):
        tell(affinity, i, running(4, texts))
    assert chosen(affinity) == {1}


@pytest.mark.parametrize("adapter", ["a", None])
def test_with_late_news_all_gateways_send_a_conversation_to_the_same_replica(adapter: str | None) -> None:
    routers = gateways(age_s=5.0)
    homes: list[int] = []
    for number in range(24):
        first = {each.choose(adapter, 800, text=conversation(number)).order[0] for each in routers}
        assert len(first) == 1
        routers[0].route(RoutingHint(number, adapter, 800, text=conversation(number)))
        routers[0].begin(number)
        assert {each.choose(adapter, 1000, text=conversation(number, 2)).order[0] for each in routers} == first
        routers[0].complete(number)
        homes += first
    assert max(Counter(homes).values()) <= 8, "different conversations go to different replicas"


@pytest.mark.parametrize("adapter", ["a", None])
def test_a_conversation_leaves_a_busy_replica_by_late_news_too(adapter: str | None) -> None:
    for router in gateways(age_s=0.5):
        home = router.choose(adapter, 800, text=conversation(1)).order[0]
        tell(router, home, replace(running(20, 1), queued_work=5 * RATE), 0.5)
        assert router.choose(adapter, 800, text=conversation(1)).order[0] != home


def test_with_fresh_news_each_gateway_takes_a_replica_that_it_prefers() -> None:
    found = {each.choose(None, 800, text=conversation(1)).order[0] % GATEWAYS for each in gateways(age_s=0.0)}
    assert found == set(range(GATEWAYS))


@pytest.mark.parametrize("adapters", [0, 1, 16])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_a_gateway_without_any_news_spreads_texts(adapters: int, after_s: float) -> None:
    affinity = ManualAffinity()
    affinity.set_members([Member(f"r{i}", i) for i in range(REPLICAS)])
    affinity.clock.now_s += after_s
    sent: Counter[int] = Counter()
    for number in range(160):
        adapter = f"a{number % adapters}" if adapters else None
        text = TextHint(tuple(number * 7919 + page for page in range(20)))
        sent[affinity.route(RoutingHint(number, adapter, 20 * 64, text=text)).order[0]] += 1
    assert len(sent) == REPLICAS
    assert max(sent.values()) <= 50


@dataclass(frozen=True)
class Ended:
    """The end of a text at a replica, or nowhere."""

    request: int
    replica: str | None
    cached: int


Step = tuple[StateReport, float] | list[str] | RoutingHint | Ended | int | float
NAMES = st.sampled_from([f"r{i}" for i in range(12)])
PAGES = st.lists(st.integers(0, 9), max_size=6).map(tuple)
AMOUNTS = st.floats(0, 1e9)
REPORTS = st.builds(
    StateReport, NAMES,
    st.builds(QueueLoad, st.integers(0, 5), AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, st.just(0.0), st.integers(0, 300),
              AMOUNTS, AMOUNTS, AMOUNTS),
    st.builds(holdings, st.frozensets(st.sampled_from("abc")), number=st.integers(0, 5)),
    st.sampled_from([(), (GATEWAY,), ("you", GATEWAY, "third")]), st.dictionaries(st.just(GATEWAY), AMOUNTS),
    st.none() | st.builds(PrefixNews, PAGES, st.floats(0, 100)),
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(REPORTS, st.floats(0, 20)),
        st.sets(NAMES).map(sorted),
        st.builds(RoutingHint, st.integers(0, 9), st.sampled_from([None, "a", "b"]), st.just(400), st.none() | NAMES,
                  text=st.builds(TextHint, PAGES, st.just(1), st.just(500))),
        st.builds(Ended, st.integers(0, 9), st.none() | NAMES, st.integers(0, 500)),
        st.integers(0, 9),
        st.floats(-3, 15),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=30)
@given(STEPS)
def test_the_choice_is_among_the_replicas_whatever_they_tell(steps: list[Step]) -> None:
    """Replicas start, restart under their id, drain, are lost and come back; what they told may still arrive."""
    affinity, members = ManualAffinity(), list[str]()
    for step in steps:
        match step:
            case tuple():
                affinity.on_report(step[0], GATEWAY, step[1])
            case list():
                members = step
                affinity.set_members([Member(name, int(name[1:])) for name in members])
            case RoutingHint():
                order = [members[i] for i in affinity.route(step).order]
                assert len(set(order)) == len(order) == min(len(members), SHORTLIST)
                assert step.avoid not in (order if len(members) > SHORTLIST else order[:-1])
            case Ended():
                affinity.complete(step.request, step.replica, load(3), 0.5, step.cached)
            case int():
                affinity.begin(step)
            case float():
                affinity.clock.now_s += step
