"""Ray's side of the router: whatever it is given, it answers with replicas and never raises."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID

from ranklet.routing.affinity import Policy, prefer
from ranklet.routing.router import AdapterRouter
from ranklet.routing.view import ReplicaView

DEPLOYMENT = DeploymentID(name="Replica", app_name="ranklet")


@dataclass
class Stated:
    """What a router reads of Ray's RunningReplica, whose constructor wants a live actor."""

    replica_id: ReplicaID
    replica_metadata: Any
    routing_stats: Any = field(default_factory=dict)


def stated(rank: int, *resident: str) -> Stated:
    return Stated(ReplicaID(f"r{rank}", DEPLOYMENT), {"rank": rank}, {"resident": list(resident)})


def pending(adapter: str, **kwargs: Any) -> Any:
    asked = {"adapter": adapter, **kwargs}
    return SimpleNamespace(kwargs=asked, routing_context=SimpleNamespace(should_backoff=False))


@pytest.fixture
def router() -> AdapterRouter:
    made = AdapterRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    made.initialize_state()
    return made


async def choose(router: AdapterRouter, replicas: list[Any], request: PendingRequest | None) -> list[str]:
    chosen = await router.choose_replicas(replicas, request)
    return [replica.replica_id.unique_id for rank in chosen for replica in rank]


async def test_it_follows_the_policy(router: AdapterRouter) -> None:
    replicas = [stated(rank) for rank in range(5)]
    expected = prefer([ReplicaView(f"r{rank}", rank) for rank in range(5)], "legal", Policy())
    request = pending("legal")
    assert await choose(router, replicas, request) == [f"r{index}" for index in expected]
    assert request.routing_context.should_backoff


async def test_it_sees_residency_and_its_own_load(router: AdapterRouter) -> None:
    replicas = [stated(0), stated(1, "legal"), stated(2)]
    assert (await choose(router, replicas, pending("legal")))[0] == "r1"
    router.replica_queue_len_cache.update(replicas[1].replica_id, 500)
    assert (await choose(router, replicas, pending("legal")))[-1] == "r1"


async def test_the_replica_that_failed_comes_last(router: AdapterRouter) -> None:
    replicas = [stated(rank) for rank in range(3)]
    first = (await choose(router, replicas, pending("legal")))[0]
    assert (await choose(router, replicas, pending("legal", avoid=first)))[-1] == first


async def test_no_request_gives_all_replicas(router: AdapterRouter) -> None:
    assert await choose(router, [stated(0), stated(1)], None) == ["r0", "r1"]


@pytest.mark.parametrize(
    ("metadata", "stats"),
    [(None, None), ({}, {}), ({"rank": "zero"}, {"resident": 7}), (7, "x"), ({"rank": None}, {"resident": [None, 3]})],
)
async def test_replicas_that_say_nonsense_are_still_used(router: AdapterRouter, metadata: Any, stats: Any) -> None:
    odd = Stated(ReplicaID("odd", DEPLOYMENT), metadata, stats)
    assert sorted(await choose(router, [odd, stated(1)], pending("legal"))) == ["odd", "r1"]


async def test_a_request_it_cannot_read_is_still_routed(router: AdapterRouter) -> None:
    assert sorted(await choose(router, [stated(0), stated(1)], SimpleNamespace())) == ["r0", "r1"]  # type: ignore[arg-type]


@pytest.mark.parametrize("kwargs", [{"balance": "much"}, {"balance": 0.1}, {"spill": 8}, {"free_in_flight": None}])
async def test_unusable_settings_are_ignored(router: AdapterRouter, kwargs: dict[str, Any]) -> None:
    router.initialize_state(**kwargs)
    assert sorted(await choose(router, [stated(0), stated(1)], pending("legal"))) == ["r0", "r1"]
