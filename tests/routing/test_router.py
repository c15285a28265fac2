"""Ray's side of the router: whatever it is given, it answers with replicas and never raises."""

import time
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import ReplicaID

from ranklet.routing import counters
from ranklet.routing.affinity import Affinity
from ranklet.routing.counters import Counters
from ranklet.routing.hint import HINT, RoutingHint
from ranklet.routing.router import AdapterRouter
from tests.ray_internals import DeploymentHandleSource, DeploymentID
from tests.routing.given import told

DEPLOYMENT = DeploymentID(name="Replica", app_name="ranklet")


@dataclass
class Stated:
    """What a router reads of Ray's RunningReplica, whose constructor wants a live actor."""

    replica_id: ReplicaID
    replica_metadata: Any


def stated(rank: int) -> Stated:
    return Stated(ReplicaID(f"r{rank}", DEPLOYMENT), {"rank": rank})


def pending(adapter: str | None = None, *, id: int = 1, tokens: int = 10, **more: Any) -> Any:
    hint = RoutingHint(id, adapter, tokens, **more)
    return SimpleNamespace(kwargs={HINT: hint}, routing_context=SimpleNamespace(should_backoff=False))


@pytest.fixture
def router(routes: Affinity) -> AdapterRouter:
    made = AdapterRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    made.initialize_state()
    return made


async def choose(router: AdapterRouter, replicas: list[Any], request: Any) -> list[str]:
    chosen = await router.choose_replicas(replicas, request)
    return list(dict.fromkeys(replica.replica_id.unique_id for rank in chosen for replica in rank))


async def test_it_sees_what_replicas_tell(router: AdapterRouter, routes: Affinity) -> None:
    replicas = [stated(rank) for rank in range(3)]
    request = pending("legal")
    await choose(router, replicas, request)
    assert request.routing_context.should_backoff
    told(routes, 1, 0, ["legal"])
    assert (await choose(router, replicas, pending("legal")))[0] == "r1"
    told(routes, 1, 10_000_000, ["legal"], number=2, now_s=time.monotonic())
    assert (await choose(router, replicas, pending("legal")))[-1] == "r1"


async def test_it_counts_what_it_sends_wherever_ray_sends_it(router: AdapterRouter, routes: Affinity) -> None:
    replicas = [stated(rank) for rank in range(3)]
    request = pending("legal", id=5)
    first, second, _ = await choose(router, replicas, request)
    assert routes.fleet.where(5) == first
    router.on_request_routed(request, ReplicaID(second, DEPLOYMENT), None)
    assert routes.fleet.where(5) == second
    router.on_request_routed(request, ReplicaID("unknown", DEPLOYMENT), None)
    assert routes.fleet.where(5) == second


async def test_the_replica_that_failed_comes_last(router: AdapterRouter) -> None:
    replicas = [stated(rank) for rank in range(3)]
    first = (await choose(router, replicas, pending("legal")))[0]
    assert (await choose(router, replicas, pending("legal", avoid=first)))[-1] == first


async def test_an_order_goes_to_the_replica_it_is_for(router: AdapterRouter) -> None:
    replicas = [stated(rank) for rank in range(3)]
    assert (await choose(router, replicas, pending(tokens=0, only="r2")))[0] == "r2"
    assert sorted(await choose(router, replicas, pending(tokens=0, only="gone"))) == ["r0", "r1", "r2"]


async def test_orders_to_load_are_passed_on(router: AdapterRouter, routes: Affinity) -> None:
    replicas = [stated(rank) for rank in range(4)]
    routes.orders = SimpleQueue()
    for id in range(3000):
        await choose(router, replicas, pending("hot", id=id, tokens=10_000))
        routes.fleet.ended(id)
    ordered = {routes.orders.get_nowait() for _ in range(routes.orders.qsize())}
    assert {adapter for _, adapter in ordered} == {"hot"}
    assert len(ordered) >= 2


async def test_no_request_gives_all_replicas(router: AdapterRouter) -> None:
    assert await choose(router, [stated(0), stated(1)], None) == ["r0", "r1"]


@pytest.mark.parametrize("metadata", [None, {}, {"rank": "zero"}, 7, {"rank": None}, {"rank": -(1 << 80)}])
async def test_replicas_that_say_nonsense_are_still_used(router: AdapterRouter, metadata: Any) -> None:
    odd = Stated(ReplicaID("odd", DEPLOYMENT), metadata)
    assert sorted(await choose(router, [odd, stated(1)], pending("legal"))) == ["odd", "r1"]


@pytest.mark.parametrize("kwargs", [{}, {HINT: 7}, None])
async def test_a_request_it_cannot_read_is_still_routed(router: AdapterRouter, kwargs: Any) -> None:
    odd = SimpleNamespace(kwargs=kwargs, routing_context=SimpleNamespace(should_backoff=False))
    assert sorted(await choose(router, [stated(0), stated(1)], odd)) == ["r0", "r1"]
    assert sorted(await choose(router, [stated(0), stated(1)], SimpleNamespace())) == ["r0", "r1"]


@pytest.mark.parametrize("kwargs", [{"scatter_s": "much"}, {"tie_s": -1}, {"spill": 8}, {"load_of_home": None}])
async def test_unusable_settings_are_ignored(router: AdapterRouter, kwargs: dict[str, Any]) -> None:
    router.initialize_state(**kwargs)
    assert sorted(await choose(router, [stated(0), stated(1)], pending("legal"))) == ["r0", "r1"]


async def test_choices_are_told_apart(router: AdapterRouter, routes: Affinity, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counters()
    monkeypatch.setattr(counters, "_CURRENT", seen)
    replicas = [stated(rank) for rank in range(2)]
    await choose(router, replicas, pending())
    assert seen == Counters()
    home = (await choose(router, replicas, pending("a")))[0]
    assert (seen.hits, seen.misses, dict(seen.spills)) == (0, 1, {})
    await choose(router, replicas, pending("a", avoid=home))
    assert (seen.misses, dict(seen.spills)) == (2, {"retry": 1})
    told(routes, 1 - int(home[1]), 0, ["a"])
    await choose(router, replicas, pending("a"))
    assert (seen.hits, dict(seen.spills)) == (1, {"retry": 1})
    told(routes, int(home[1]), 90_000, ["a"], now_s=time.monotonic())
    await choose(router, replicas, pending("a"))
    assert (seen.hits, dict(seen.spills)) == (2, {"retry": 1, "load": 1})
