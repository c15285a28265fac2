"""Ray's side of the router: it returns replicas for any input, and never raises."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import ReplicaID

from ranklet.routing.binding import bind
from ranklet.routing.counters import Counters
from ranklet.routing.hint import HINT, PrefetchOrder, RoutingHint
from ranklet.routing.policy import RENAMED
from ranklet.routing.router import AdapterRouter
from tests.ray_internals import DeploymentHandleSource, DeploymentID
from tests.routing.given import ManualAffinity, report

DEPLOYMENT = DeploymentID(name="Replica", app_name="ranklet")


@dataclass
class StubReplica:
    """The attributes of Ray's RunningReplica that the router reads. Its constructor needs a live actor."""

    replica_id: ReplicaID
    replica_metadata: Any


def stub(rank: int) -> StubReplica:
    return StubReplica(ReplicaID(f"r{rank}", DEPLOYMENT), {"rank": rank})


def pending(adapter: str | None = None, *, id: int = 1, work: float = 10, **more: Any) -> Any:
    hint = RoutingHint(id, adapter, work, **more)
    return SimpleNamespace(kwargs={HINT: hint}, routing_context=SimpleNamespace(should_backoff=False))


@pytest.fixture
def affinity() -> ManualAffinity:
    return ManualAffinity()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def router_with(affinity: ManualAffinity, counters: Counters) -> Callable[..., AdapterRouter]:
    def make(**kwargs: Any) -> AdapterRouter:
        bind(affinity, counters)
        router = AdapterRouter(
            deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        router.initialize_state(**kwargs)
        return router

    return make


@pytest.fixture
def router(router_with: Callable[..., AdapterRouter]) -> AdapterRouter:
    return router_with()


async def choose(router: AdapterRouter, replicas: list[Any], request: Any) -> list[str]:
    chosen = await router.choose_replicas(replicas, request)
    return list(dict.fromkeys(replica.replica_id.unique_id for rank in chosen for replica in rank))


async def test_choices_follow_the_reports_to_the_bound_affinity(
    router: AdapterRouter, affinity: ManualAffinity
) -> None:
    replicas = [stub(rank) for rank in range(3)]
    request = pending("legal")
    await choose(router, replicas, request)
    assert request.routing_context.should_backoff
    report(affinity, 1, 0, ["legal"])
    assert (await choose(router, replicas, pending("legal")))[0] == "r1"
    report(affinity, 1, 10_000_000, ["legal"], number=2)
    assert (await choose(router, replicas, pending("legal")))[-1] == "r1"


async def test_a_request_counts_at_the_replica_that_has_taken_it(
    router: AdapterRouter, affinity: ManualAffinity
) -> None:
    replicas = [stub(rank) for rank in range(3)]
    request = pending("legal", id=5)
    first, second, _ = await choose(router, replicas, request)
    assert affinity.replica_of(5) == first
    router.on_request_routed(request, ReplicaID(second, DEPLOYMENT), None)
    assert affinity.replica_of(5) == second
    router.on_request_routed(request, ReplicaID("unknown", DEPLOYMENT), None)
    assert affinity.replica_of(5) == second


async def test_the_replica_that_failed_comes_last(router: AdapterRouter) -> None:
    replicas = [stub(rank) for rank in range(3)]
    first = (await choose(router, replicas, pending("legal")))[0]
    assert (await choose(router, replicas, pending("legal", avoid=first)))[-1] == first


async def test_a_call_for_one_replica_goes_there_while_it_is_up(router: AdapterRouter) -> None:
    replicas = [stub(rank) for rank in range(3)]
    assert (await choose(router, replicas, pending(work=0, only="r2")))[0] == "r2"
    assert sorted(await choose(router, replicas, pending(work=0, only="gone"))) == ["r0", "r1", "r2"]


async def test_prefetch_orders_return_the_location_of_the_request(
    router: AdapterRouter, affinity: ManualAffinity
) -> None:
    replicas, location = [stub(rank) for rank in range(4)], object()
    for id in range(3000):
        await choose(router, replicas, pending("hot", id=id, work=10_000, location=location))
        affinity.complete(id)
        affinity.clock.now_s += 0.001
    orders = affinity.pop_prefetch_orders()
    assert len({order.replica for order in orders}) >= 2
    assert all(order == PrefetchOrder(order.replica, "hot", location) for order in orders)
    assert affinity.pop_prefetch_orders() == []


async def test_no_request_gives_all_replicas(router: AdapterRouter) -> None:
    assert await choose(router, [stub(0), stub(1)], None) == ["r0", "r1"]


@pytest.mark.parametrize("metadata", [None, {}, {"rank": "zero"}, 7, {"rank": None}, {"rank": -(1 << 80)}])
async def test_a_replica_with_unusable_metadata_is_still_used(router: AdapterRouter, metadata: Any) -> None:
    odd = StubReplica(ReplicaID("odd", DEPLOYMENT), metadata)
    assert sorted(await choose(router, [odd, stub(1)], pending("legal"))) == ["odd", "r1"]


@pytest.mark.parametrize("kwargs", [{}, {HINT: 7}, None])
async def test_a_request_without_a_usable_hint_is_still_routed(router: AdapterRouter, kwargs: Any) -> None:
    odd = SimpleNamespace(kwargs=kwargs, routing_context=SimpleNamespace(should_backoff=False))
    assert sorted(await choose(router, [stub(0), stub(1)], odd)) == ["r0", "r1"]
    assert sorted(await choose(router, [stub(0), stub(1)], SimpleNamespace())) == ["r0", "r1"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"extra_home_cost_s": "much"}, "extra_home_cost_s: expected a number"),
        ({"spill": 8}, "spill: unknown"),
        ({"scatter_s": 0.1}, f"scatter_s: renamed to {RENAMED['scatter_s']}"),
    ],
)
async def test_unusable_settings_are_logged_and_ignored(
    router_with: Callable[..., AdapterRouter], caplog: pytest.LogCaptureFixture, kwargs: dict[str, Any], message: str
) -> None:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        router = router_with(**kwargs)
    finally:
        logger.removeHandler(caplog.handler)
    assert message in caplog.text
    assert sorted(await choose(router, [stub(0), stub(1)], pending("legal"))) == ["r0", "r1"]


async def test_settings_reach_the_policy(router_with: Callable[..., AdapterRouter], affinity: ManualAffinity) -> None:
    """Without cost, an extra home is used as soon as its load takes less time than the wait."""
    router = router_with(extra_home_cost_s=0, away_wait_surcharge=0)
    replicas = [stub(0), stub(1)]
    home = int((await choose(router, replicas, pending("a", work=0)))[0][1])
    report(affinity, home, 20_000, ["a"])  # 0.2 s, and a load takes 0.15 s
    assert (await choose(router, replicas, pending("a", work=0)))[0] == f"r{1 - home}"


async def test_choices_are_counted_by_outcome(
    router: AdapterRouter, affinity: ManualAffinity, counters: Counters
) -> None:
    replicas = [stub(rank) for rank in range(2)]
    await choose(router, replicas, pending())
    assert counters == Counters()
    home = (await choose(router, replicas, pending("a")))[0]
    assert (counters.hits, counters.misses, dict(counters.spills)) == (0, 1, {})
    await choose(router, replicas, pending("a", avoid=home))
    assert (counters.misses, dict(counters.spills)) == (2, {"retry": 1})
    report(affinity, 1 - int(home[1]), 0, ["a"])
    await choose(router, replicas, pending("a"))
    assert (counters.hits, dict(counters.spills)) == (1, {"retry": 1})
    report(affinity, int(home[1]), 90_000, ["a"])
    await choose(router, replicas, pending("a"))
    assert (counters.hits, dict(counters.spills)) == (2, {"retry": 1, "load": 1})
