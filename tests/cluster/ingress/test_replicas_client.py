"""Calls to replicas carry a routing hint, are repeated after failures, and wait for replicas for a limited time."""

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.suspects import Suspects
from ranklet.cluster.message import EmbedResult, InferenceCall, InferenceReply, Refusal
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import AdapterLoadCrashed, InvalidRequest, RankletError, Saturated, Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import HINT
from ranklet.routing.report import QueueLoad
from ranklet.routing.router import AdapterRouter
from tests.ray_internals import DeploymentHandleSource, DeploymentID, pending_request, queue_and_dequeue
from tests.virtual_time import run_in_virtual_time

PROMPTS = [np.arange(1, 5, dtype=np.int32)]
REPLY = InferenceReply(
    result=EmbedResult(np.ones(8, np.float32).tobytes(), 8),
    prompt_tokens=4,
    tier="gpu",
    backend="csgmv",
    replica="r0",
    revision=None,
    queue_s=0.0,
    compute_s=0.0,
    load=QueueLoad(1, 0, 0.0, 0, 4),
)


class FakeHandle:
    """Stands in for Ray's handle: records the calls and returns `results` in their order."""

    def __init__(self, *results: InferenceReply[EmbedResult] | Refusal) -> None:
        self.results = list(results)
        self.options_given: dict[str, Any] = {}
        self.calls: list[InferenceCall[EmbedParams]] = []
        self.kwargs: list[dict[str, Any]] = []

    def options(self, **options: Any) -> "FakeHandle":
        self.options_given = options
        return self

    async def remote(self, call: InferenceCall[EmbedParams], **kwargs: Any) -> InferenceReply[EmbedResult] | Refusal:
        self.calls.append(call)
        self.kwargs.append(kwargs)
        return self.results.pop(0)


class SilentHandle(FakeHandle):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.has_call = asyncio.Event()

    def remote(self, call: InferenceCall[EmbedParams], **kwargs: Any) -> Any:
        self.has_call.set()
        return asyncio.get_running_loop().create_future()


def client_of(handle: Any, affinity: Affinity | None = None, **limits: float) -> ReplicasClient:
    return ReplicasClient(
        handle, affinity or Affinity(), LimitsConfig.model_validate(limits), lambda continues: None, "gateway"
    )


async def embed(replicas: ReplicasClient, adapter: AdapterLocation | None = None) -> list[InferenceReply[EmbedResult]]:
    return await replicas.infer("embed", adapter, PROMPTS, EmbedParams(), 32)


@pytest.mark.parametrize("adapter", [AdapterLocation("legal", "/adapters/legal"), None])
async def test_the_hint_names_the_adapter_and_the_work(adapter: AdapterLocation | None) -> None:
    handle = FakeHandle(REPLY)
    assert await embed(client_of(handle), adapter) == [REPLY]
    (kwargs,) = handle.kwargs
    hint = kwargs.pop(HINT)
    assert not kwargs
    assert (hint.adapter, hint.work) == (adapter and "legal", 4)
    assert (hint.avoid, hint.only) == (None, None)
    assert handle.options_given == {"method_name": "embed"}


def refusal(error: RankletError) -> Refusal:
    return Refusal.of(error, "r0", "legal", None)


@pytest.mark.parametrize("error", [Unavailable("the engine has stopped"), Saturated("the queue is full")])
async def test_a_call_that_another_replica_may_answer_is_repeated_once_and_elsewhere(error: RankletError) -> None:
    handle = FakeHandle(refusal(error), REPLY)
    assert await embed(client_of(handle)) == [REPLY]
    assert [kwargs[HINT].avoid for kwargs in handle.kwargs] == [None, "r0"]
    handle = FakeHandle(refusal(error), refusal(error))
    with pytest.raises(type(error)):
        await embed(client_of(handle))
    assert len(handle.calls) == 2


@pytest.mark.parametrize("error", [AdapterLoadCrashed("the engine died"), InvalidRequest("too long", param="input")])
async def test_a_call_that_would_fail_or_kill_another_replica_too_is_not_repeated(error: RankletError) -> None:
    handle = FakeHandle(refusal(error))
    with pytest.raises(type(error), match=error.message):
        await embed(client_of(handle), AdapterLocation("legal", "/adapters/legal"))
    assert len(handle.calls) == 1


async def test_an_adapter_that_was_loading_when_an_engine_died_is_not_tried_on_the_next() -> None:
    crashed, told = AdapterLoadCrashed("the engine died"), list[tuple[str, str]]()

    async def tell(name: str, source: str) -> None:
        told.append((name, source))

    handle = FakeHandle(refusal(crashed), REPLY)
    given: Any = handle
    replicas = ReplicasClient(given, Affinity(), LimitsConfig(), lambda again: None, "gateway", tell)
    legal = AdapterLocation("legal", "/adapters/legal")
    for _ in range(5):
        with pytest.raises(AdapterLoadCrashed):
            await embed(replicas, legal)
    assert (len(handle.calls), told) == (1, [("legal", "/adapters/legal")])
    assert await embed(replicas, AdapterLocation("legal", "/adapters/mended")) == [REPLY]


def test_each_death_of_an_engine_makes_an_adapter_wait_longer() -> None:
    now_s, legal = 0.0, AdapterLocation("legal", "/adapters/legal")
    suspects = Suspects(clock=lambda: now_s)
    for wait_s in (10, 60, 600, 600):
        suspects.check(legal)
        for _ in range(3):
            suspects.add(legal.name, legal.source)
        now_s += wait_s - 1
        with pytest.raises(AdapterLoadCrashed, match="for 1 s") as refused:
            suspects.check(legal)
        assert refused.value.retry_after_s == 1
        suspects.check(AdapterLocation("medical", "/adapters/medical"))
        now_s += 1
    suspects.add(legal.name, legal.source)
    suspects.clear(legal.name)
    suspects.check(legal)


async def test_ray_keeps_no_answered_call() -> None:
    """With a multiplexed model id among the options, Ray 2.60's router would keep every call."""
    handle = FakeHandle(REPLY)
    await embed(client_of(handle), AdapterLocation("legal", "/adapters/legal"))
    router = AdapterRouter(
        deployment_id=DeploymentID("Replica", "ranklet"), handle_source=DeploymentHandleSource.REPLICA
    )
    options = {name: value for name, value in handle.options_given.items() if name == "multiplexed_model_id"}
    pending = pending_request(list(handle.calls), handle.kwargs[0], **options)
    kept = weakref.ref(pending)
    queue_and_dequeue(router, pending)
    del pending
    gc.collect()
    assert kept() is None


def test_a_call_waits_for_a_replica_for_a_limited_time_while_there_is_none() -> None:
    async def run() -> None:
        affinity = Affinity()
        replicas = client_of(SilentHandle(), affinity, no_replica_timeout_s=6.0, request_timeout_s=60.0)
        watching = asyncio.ensure_future(replicas.watchdog.run())
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(Unavailable, match="none is up"):
            await embed(replicas)
        assert 6.0 <= loop.time() - began_s < 6.1
        affinity.set_members([Member("r0", 0)])
        began_s = loop.time()
        with pytest.raises(Unavailable, match="request_timeout_s"):
            await embed(replicas)
        assert loop.time() - began_s == pytest.approx(60.0)
        watching.cancel()

    run_in_virtual_time(run())


async def test_calls_end_with_an_error_when_the_time_to_stop_has_come() -> None:
    handle = SilentHandle()
    replicas = client_of(handle)
    call = asyncio.ensure_future(embed(replicas))
    await handle.has_call.wait()
    replicas.watchdog.end_calls()
    for each in (call, embed(replicas)):
        with pytest.raises(Unavailable, match="the gateway stops"):
            await each
