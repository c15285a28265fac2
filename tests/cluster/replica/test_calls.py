"""Text calls that a replica continues need the revision and the base model that have begun their texts."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.resolver import AdapterResolver
from ranklet.cluster.message import Continuation, InferenceReply, Refusal, pack, pack_tokens
from ranklet.cluster.replica.calls import ReplicaCalls
from ranklet.cluster.replica.feeds import OutgoingFeeds
from ranklet.cluster.replica.state import ReplicaState
from ranklet.cluster.text_result import GenerateResult
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import WEIGHTS_FILE
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import RankletError
from ranklet.replicas.process.process import EngineProcess
from tests.assets.adapters import save_adapter
from tests.assets.families import make_family
from tests.replicas.asking import until

PROMPT = np.arange(5, 30, dtype=np.int32)
PARAMS = GenerateParams(max_tokens=20, temperature=0.9, seed=4, ignore_eos=True)


class ReplicaScene:
    """The calls of one replica with an engine, and an adapter whose files may change."""

    def __init__(self, folder: Path) -> None:
        make_family(folder, "llama")
        model = folder / "model"
        self.engine = EngineProcess(EngineConfig(model, slots=2, max_model_len=128, kv_cache_bytes=4 << 20))
        self.engine.start()
        cache = RemoteCache(folder / "cache", 1 << 20, 1 << 20)
        self.resolver = AdapterResolver(cache, 10.0)
        state, feeds = ReplicaState("r0", 2, 64), OutgoingFeeds()
        self.calls = ReplicaCalls("r0", self.engine, self.resolver, state, feeds, AdapterSettings(model))
        self.live, self.other = (
            save_adapter(model, folder / name, r=8, target_modules=["q_proj", "up_proj"], seed=seed)
            for name, seed in (("live", 1), ("other", 2))
        )

    async def generate(
        self, revision: str | None, given: list[int] | None = None, base_revision: str | None = None
    ) -> InferenceReply[GenerateResult] | Refusal:
        adapter = AdapterLocation("live", str(self.live), revision)
        call: Any = pack(adapter, [PROMPT], PARAMS, "g")
        if given is not None:
            base = self.engine.limits.base_revision if base_revision is None else base_revision
            packed = pack_tokens([np.array(given, np.int32)])
            call = type(call)(**{**vars(call), "continuation": Continuation(*packed, base)})
        return await self.calls.answer(call, GenerateResult.of)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[ReplicaScene]:
    made = await asyncio.to_thread(ReplicaScene, tmp_path)
    yield made
    await asyncio.to_thread(made.engine.stop)


def tokens_of(reply: InferenceReply[GenerateResult] | Refusal) -> list[int]:
    assert isinstance(reply, InferenceReply), reply
    (choice,) = reply.result.choices
    tokens: list[int] = choice.ids().tolist()
    return tokens


def code_of(reply: InferenceReply[GenerateResult] | Refusal) -> tuple[str, bool]:
    assert isinstance(reply, Refusal), reply
    error: RankletError = reply.error()
    return error.code, reply.has_begun


async def test_a_text_is_continued_by_the_revision_that_has_begun_it(scene: ReplicaScene) -> None:
    revision = revision_of(scene.live)
    whole = tokens_of(await scene.generate(revision))
    assert tokens_of(await scene.generate(revision, whole[:7])) == whole
    assert code_of(await scene.generate(revision, whole[:7], base_revision="other")) == ("unavailable", False)
    shutil.copy(scene.other / WEIGHTS_FILE, scene.live / WEIGHTS_FILE)
    await asyncio.sleep(1.1)  # until then, the files may still change
    scene.resolver.invalidate("live")
    assert code_of(await scene.generate(revision))[0] == "model_not_found", "a new text needs the current files"
    assert tokens_of(await scene.generate(revision, whole[:7])) == whole, "the old revision is still in a slot"
    assert tokens_of(await scene.generate(revision_of(scene.live))) != whole
    shutil.rmtree(scene.live)
    assert tokens_of(await scene.generate(revision, whole[:7])) == whole
    await asyncio.to_thread(until, lambda: scene.engine.release("live"))
    assert code_of(await scene.generate(revision, whole[:7]))[0] in ("model_not_found", "adapter_not_found")
    await asyncio.to_thread(scene.engine.stop)
    assert code_of(await scene.generate(None)) == ("unavailable", False), "an engine that has ended gets no call"
