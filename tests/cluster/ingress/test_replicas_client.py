"""What a gateway hands to Ray for each call, and that Ray keeps none of it."""

import asyncio
import gc
import time
import weakref
from typing import Any

import numpy as np
import pytest

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.message import EmbedResult, InferenceCall, InferenceReply
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import Unavailable
from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Member
from ranklet.routing.hint import HINT
from ranklet.routing.report import QueueLoad
from ranklet.routing.router import AdapterRouter
from tests.ray_internals import DeploymentHandleSource, DeploymentID, pending_request, queue_and_dequeue

PROMPTS = [np.arange(1, 5, dtype=np.int32)]


class Handle:
    """Stands where Ray's handle stands and notes what it is given."""

    def __init__(self) -> None:
        self.options_given: dict[str, Any] = {}
        self.call: InferenceCall[EmbedParams] | None = None
        self.kwargs: dict[str, Any] = {}

    def options(self, **options: Any) -> "Handle":
        self.options_given = options
        return self

    async def remote(self, call: InferenceCall[EmbedParams], **kwargs: Any) -> InferenceReply[EmbedResult]:
        self.call, self.kwargs = call, kwargs
        return InferenceReply(
            EmbedResult(np.ones(8, np.float32).tobytes(), 8),
            4,
            "gpu",
            "csgmv",
            "r0",
            None,
            0.0,
            0.0,
            QueueLoad(1, 0, 0.0, 0, 4),
        )


async def asked(adapter: AdapterLocation | None) -> Handle:
    handle: Any = Handle()
    answer = await ReplicasClient(handle, Affinity(), 5.0, lambda: None).embed(adapter, PROMPTS, None, 8)
    assert answer.vectors.shape == (1, 8)
    assert isinstance(handle, Handle)
    return handle


async def test_the_adapter_is_named_to_the_router(tmp_path: Any) -> None:
    named, bare = await asked(AdapterLocation("legal", tmp_path)), await asked(None)
    for handle, adapter in ((named, "legal"), (bare, None)):
        hint = handle.kwargs.pop(HINT)
        assert not handle.kwargs
        assert (hint.adapter, hint.work, hint.avoid, hint.only) == (adapter, 4, None, None)
    assert named.options_given == {"method_name": "embed"}


async def test_ray_forgets_a_call_that_was_answered(tmp_path: Any) -> None:
    """With a multiplexed model id among the options, Ray 2.60's router would keep it for ever."""
    handle = await asked(AdapterLocation("legal", tmp_path))
    router = AdapterRouter(
        deployment_id=DeploymentID("Replica", "ranklet"), handle_source=DeploymentHandleSource.REPLICA
    )
    options = {name: value for name, value in handle.options_given.items() if name == "multiplexed_model_id"}
    pending = pending_request([handle.call], handle.kwargs, **options)
    kept = weakref.ref(pending)
    queue_and_dequeue(router, pending)
    del pending
    gc.collect()
    assert kept() is None


async def test_where_there_is_no_replica_nobody_waits_long() -> None:
    """But as long as it takes one to come up."""

    class Nobody(Handle):
        def remote(self, call: InferenceCall[EmbedParams], **kwargs: Any) -> Any:
            return asyncio.get_running_loop().create_future()

    affinity = Affinity()
    handle: Any = Nobody()
    replicas = ReplicasClient(handle, affinity, 30.0, lambda: None, patience_s=0.3)
    watch = asyncio.ensure_future(replicas.watch())
    try:
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match="none is up"):
            await replicas.embed(None, PROMPTS, None, 8)
        assert 0.3 <= time.monotonic() - began_s < 5
        affinity.set_members([Member("r0", 0)])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await replicas.embed(None, PROMPTS, None, 8)
    finally:
        watch.cancel()
