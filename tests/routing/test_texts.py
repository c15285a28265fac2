"""Texts go where their prefix is while that pays, and where there is room for them."""

from dataclasses import replace

import pytest

from ranklet.routing.hint import RoutingHint, TextHint
from ranklet.routing.prefix_log import PrefixLog
from ranklet.routing.report import PrefixNews, QueueLoad, StateReport
from ranklet.routing.speed import SpeedMeter
from tests.routing.given import GATEWAY, RATE, ManualAffinity, affinity_with, holdings, load, report

PAGES = tuple(range(100, 130))
TEXT = TextHint(PAGES, 1, 30 * 64 + 200)


def tell(affinity: ManualAffinity, i: int, queue: QueueLoad | None = None, **news: float | tuple[int, ...]) -> None:
    affinity.on_report(
        StateReport(f"r{i}", queue or load(2), holdings(["a"]), (), {}, PrefixNews(**news)),  # type: ignore[arg-type]
        GATEWAY,
    )


def best(affinity: ManualAffinity, text: TextHint | None = TEXT, adapter: str | None = "a") -> int:
    return affinity.choose(adapter, 30 * 64 + 10, text=text).order[0]


def everywhere(count: int = 4, queued: dict[int, float] | None = None) -> ManualAffinity:
    return affinity_with(count, queued, {i: ["a"] for i in range(count)})


@pytest.mark.parametrize("adapter", ["a", None])
def test_a_text_goes_where_its_prefix_is(adapter: str | None) -> None:
    for holder in range(4):
        affinity = everywhere()
        tell(affinity, holder, pages=(PAGES[20],))
        assert best(affinity, adapter=adapter) == holder


def test_the_prefix_counts_only_while_waiting_for_it_pays() -> None:
    affinity = everywhere(2, queued={0: 0.05 * RATE})
    tell(affinity, 0, load(2, queued=0.03 * RATE), pages=(PAGES[-1],))
    assert best(affinity) == 0
    tell(affinity, 0, load(3, queued=0.5 * RATE))
    assert best(affinity) == 1


def test_evicted_prefixes_are_not_expected() -> None:
    affinity = everywhere(2)
    tell(affinity, 1, pages=(PAGES[-1],))
    assert best(affinity) == 1
    affinity.clock.now_s += 10
    tell(affinity, 0, load(3), pages=(PAGES[3],))
    tell(affinity, 1, load(3), kept_s=5.0)
    assert best(affinity) == 0


def test_the_next_turn_of_an_own_text_returns_to_its_replica_before_any_news() -> None:
    affinity = everywhere()
    first = affinity.route(RoutingHint(1, "a", 1900, text=TEXT)).order[0]
    affinity.begin(1)
    affinity.complete(1, f"r{first}", load(2), cached_tokens=0)
    for adapter_home in range(4):
        report(affinity, adapter_home, 0, ["a"], number=3)
    assert best(affinity, TextHint((*PAGES, 900, 901))) == first


def test_a_wrong_expectation_is_corrected_by_the_answer() -> None:
    affinity = everywhere()
    tell(affinity, 2, pages=(PAGES[-1],))
    choice = affinity.route(RoutingHint(1, "a", 1930, text=TEXT))
    assert choice.order[0] == 2
    affinity.complete(1, "r2", load(3), cached_tokens=0)
    tell(affinity, 1, pages=(PAGES[4],))
    assert best(affinity) == 1


def test_gateways_without_news_choose_the_same_replica_for_a_prefix() -> None:
    for pages in (tuple(range(start, start + 20)) for start in range(0, 200, 20)):
        chosen = {best(everywhere(8), TextHint(pages)) for _ in range(4)}
        assert len(chosen) == 1
    spread = {best(everywhere(8), TextHint((first * 7919,)), None) for first in range(40)}
    assert len(spread) > 4, "different prefixes go to different replicas"


def test_running_texts_count_as_wait_by_what_their_tokens_take() -> None:
    affinity = everywhere(2)
    busy = replace(load(2), texts=50, text_work=0.02 * RATE)
    for i, queue in ((0, busy), (1, replace(busy, texts=10))):
        tell(affinity, i, queue)
    assert best(affinity) == 1
    assert best(affinity, None) == 1, "embeddings wait for them too"


def test_a_replica_with_fewer_texts_is_preferred_although_it_measures_more_work_for_each() -> None:
    affinity = everywhere(2)
    for i, queue in enumerate((replace(load(2), texts=30, text_work=1000), replace(load(2), texts=15, text_work=2500))):
        tell(affinity, i, queue)
    assert best(affinity) == 1


def test_a_replica_that_measures_a_higher_rate_does_not_draw_longer_prompts() -> None:
    affinity = everywhere(2)
    tell(affinity, 0, load(2, rate=3 * RATE), pages=(PAGES[5],))
    tell(affinity, 1, pages=(PAGES[20],))
    assert best(affinity) == 1


def test_a_text_avoids_a_replica_without_room() -> None:
    affinity = everywhere(2)
    full = replace(load(2), texts=1, text_work=1.0, free_tokens=500.0, freed_per_s=2000.0)
    for i in range(2):
        tell(affinity, i, replace(full, free_tokens=1e6) if i == 1 else full)
    assert best(affinity) == 1
    tell(affinity, 1, replace(full, number=3, queued_work=5 * RATE))
    assert best(affinity) == 0, "waiting for room is shorter than the queue"


def full(free_texts: float, number: int = 2) -> QueueLoad:
    """Return the load of a replica where 10 texts end per second."""
    return replace(load(number), texts=256, text_work=1.0, free_texts=free_texts, ended_per_s=10.0)


@pytest.mark.parametrize("adapter", ["a", None])
def test_a_text_goes_where_fewer_texts_wait_for_others_to_end(adapter: str | None) -> None:
    for less in range(2):
        affinity = everywhere(2)
        for i in range(2):
            tell(affinity, i, full(-20 if i == less else -60))
        assert best(affinity, adapter=adapter) == less


def test_own_texts_take_places_before_the_replicas_tell_of_them() -> None:
    affinity = everywhere(2)
    for i in range(2):
        tell(affinity, i, full(4 if i == 0 else 0))
    chosen = [affinity.route(RoutingHint(id, "a", 64, text=TextHint((id * 7919,)))).order[0] for id in range(1, 21)]
    assert chosen[:3] == [0, 0, 0]
    assert 7 <= chosen.count(1) <= 10, "the others are shared"
    tell(affinity, 1, full(50, number=3))
    assert best(affinity, TextHint((1,))) == 1


def test_late_news_of_places_counts_less() -> None:
    affinity = everywhere(2)
    for i in range(2):
        affinity.on_report(StateReport(f"r{i}", full(-20 * i), holdings(["a"]), (), {}), GATEWAY, age_s=2.0)
    assert len({best(affinity, TextHint((first * 7919,))) for first in range(20)}) == 2


def test_a_text_that_has_begun_delays_no_others_but_is_missed_when_its_replica_hangs() -> None:
    affinity = everywhere(1)
    affinity.route(RoutingHint(1, "a", 50_000, text=TEXT))
    assert affinity.waits()[0] == pytest.approx(0.5, rel=0.01)
    affinity.begin(1)
    affinity.begin(1)
    assert affinity.waits()[0] < 0.001
    affinity.clock.now_s += 5
    assert affinity.stranded([1]) == {1: "r0"}
    affinity.complete(1)
    affinity.clock.now_s += 1
    assert affinity.waits() == [0.0]


def test_texts_that_have_ended_leave_no_rest_of_work() -> None:
    affinity = everywhere(1)
    tell(affinity, 0, replace(load(2), texts=1, text_work=0.1))
    for id in (1, 2, 3):
        affinity.route(RoutingHint(id, "a", 10, text=TEXT))
    for id in (1, 2, 3):
        affinity.complete(id)
    affinity.clock.now_s += 100  # without any sign of life
    assert affinity.route(RoutingHint(4, "a", 10, text=TEXT)).order == (0,)
    assert affinity.stranded([4]) == {}, "its time begins with the request"


def test_impossible_text_loads_are_ignored() -> None:
    nan, infinite = float("nan"), float("inf")
    for wrong in (
        {"texts": -1}, {"text_work": nan}, {"free_tokens": nan}, {"freed_per_s": infinite}, {"free_texts": nan},
        {"free_texts": -infinite}, {"ended_per_s": -1.0},
    ):  # fmt: skip
        assert not replace(load(), **wrong).is_possible()
    assert load().is_possible()


def test_the_log_of_pages_keeps_the_latest() -> None:
    log = PrefixLog()
    log.add(range(600))
    log.add([100])
    assert len(log) == 600
    told = log.take()
    assert len(told) == 512
    assert told[-2:] == (599, 100)
    assert log.take() == ()


def test_the_speed_weighs_tokens_of_texts_by_steps() -> None:
    speed = SpeedMeter()
    assert (speed.work_per_s, speed.text_work, speed.uncached_share, speed.freed_per_s(3)) == (0, 0, 1, 0)
    speed.add_step(1000, 50, 0.01)
    speed.add_step(0, 50, 0.005)
    speed.add_step(0, 0, 0.0)
    speed.add_text(200, 600, 2.0)
    speed.add_prompt(1000, 750)
    assert speed.work_per_s == pytest.approx(100_000)
    assert speed.text_work == pytest.approx(200 * 10)  # a decoded token takes as long as ten of a prompt
    assert speed.uncached_share == pytest.approx(0.25)
    assert speed.freed_per_s(3) == pytest.approx(900)
