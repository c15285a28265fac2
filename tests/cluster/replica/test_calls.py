"""Text calls that a replica continues need the revision and the base model that have begun their texts.

Calls tell the replica's state how far their texts are.
"""

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
from ranklet.cluster.text_prefix import call_pages
from ranklet.cluster.text_result import GenerateResult
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import WEIGHTS_FILE
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import RankletError
from ranklet.replicas.process.process import EngineProcess
from tests.assets.adapters import save_adapter
from tests.assets.families import family_texts
from tests.replicas.asking import until

PROMPT = np.arange(5, 30, dtype=np.int32)
PARAMS = GenerateParams(max_tokens=20, temperature=0.9, seed=4, ignore_eos=True)


class ReplicaScene:
    """The calls of one replica with an engine, and an adapter whose files may change."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.state = ReplicaState("r0", 2, 64)
        config = EngineConfig(model, slots=2, max_model_len=192, kv_cache_bytes=4 << 20)
        self.engine = EngineProcess(config, self.state)
        self.engine.start()
        cache = RemoteCache(folder / "cache", 1 << 20, 1 << 20)
        self.resolver = AdapterResolver(cache, 10.0)
        feeds = OutgoingFeeds()
        self.calls = ReplicaCalls("r0", self.engine, self.resolver, self.state, feeds, AdapterSettings(model))
        self.live, self.other = (
            save_adapter(model, folder / name, r=8, target_modules=["q_proj", "up_proj"], seed=seed)
            for name, seed in (("live", 1), ("other", 2))
        )

    async def generate(
        self, revision: str | None, given: list[int] | None = None, base_revision: str | None = None
    ) -> InferenceReply[GenerateResult] | Refusal:
        return await self.answer(AdapterLocation("live", str(self.live), revision), given, base_revision)

    async def answer(
        self, adapter: AdapterLocation | None, given: list[int] | None = None, base_revision: str | None = None
    ) -> InferenceReply[GenerateResult] | Refusal:
        call: Any = pack(adapter, [PROMPT], PARAMS, "g")
        if given is not None:
            base = self.engine.limits.base_revision if base_revision is None else base_revision
            packed = pack_tokens([np.array(given, np.int32)])
            call = type(call)(**{**vars(call), "continuation": Continuation(*packed, base)})
        return await self.calls.answer(call, GenerateResult.of)


@pytest.fixture
async def scene(families_dir: Path, tmp_path: Path) -> AsyncIterator[ReplicaScene]:
    model = await asyncio.to_thread(lambda: family_texts(families_dir, "llama").model)
    made = await asyncio.to_thread(ReplicaScene, model, tmp_path)
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
    assert code_of(await scene.answer(None)) == ("unavailable", False), "an engine that has ended gets no call"


async def test_calls_tell_the_state_of_their_texts_and_pages(scene: ReplicaScene) -> None:
    """A call that is cancelled leaves nothing behind."""
    prompt = np.arange(5, 75, dtype=np.int32)
    params = GenerateParams(max_tokens=58, temperature=0.0, ignore_eos=True, n=2)
    call: Any = pack(None, [prompt], params, "g")
    reply = await scene.calls.answer(call, GenerateResult.of)
    assert isinstance(reply, InferenceReply)
    text = np.concatenate((prompt, reply.result.choices[0].ids()))
    (page, _) = call_pages(call, text)
    load, news = reply.load, scene.state.report(()).prefixes
    assert (load.queued_work, load.texts, load.received_work) == (0, 0, 70)
    assert load.text_work > 0
    assert load.free_tokens > 0
    assert news is not None
    assert news.pages == (page,), "the second page has 64 tokens, but the last one has no keys and values"
    assert news.kept_s == np.inf

    longer: Any = pack(None, [text], GenerateParams(max_tokens=1), "g")
    await scene.calls.answer(longer, GenerateResult.of)
    news = scene.state.report(()).prefixes
    assert news is not None
    assert set(news.pages) == {page, call_pages(longer, text)[1]}, "the page that was found, and the deepest one"

    call = pack(None, [PROMPT], GenerateParams(max_tokens=100, ignore_eos=True), "g")
    task = asyncio.create_task(scene.calls.answer(call, GenerateResult.of))
    await asyncio.to_thread(until, lambda: scene.state.load_for("g").texts == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    load = scene.state.load_for("g")
    assert (load.texts, load.queued_work) == (0, 0)
