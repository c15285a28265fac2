"""Requests that pool in different ways share steps, with and without pages. Each has the vectors that it has alone."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import AnswerSink
from ranklet.replicas.errors import InvalidRequest
from tests.assets.adapters import AdapterSpec
from tests.assets.make import make_model
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit
from tests.replicas.engine.recording import MakeEngine
from tests.replicas.streaming import GREEDY, TextSink, draw

WAYS: list[dict[str, Any]] = [
    {}, {"normalize": False}, {"pooling": "mean"}, {"pooling": "mean", "normalize": False, "skipped": 3},
    {"pooling": "cls"}, {"pooling": "cls", "skipped": 2}, {"pooling": "last", "normalize": True, "skipped": 2},
    {"pooling": "mean", "dimensions": 40}, {"normalize": False, "dimensions": 40},
]  # fmt: skip
LENGTHS = (9, 30, 5, 17)


def owners(specs: list[AdapterSpec]) -> list[AdapterRef | None]:
    return [None, ref(specs[0].path), ref(specs[1].path)]


def one_step(engine: Engine, adapters: list[AdapterRef | None]) -> list[NDArray[np.float32]]:
    """Compute the requests of `one_by_one` in one step, past the queue and without what the host does to vectors."""
    for each in adapters:
        if each is not None:
            engine.load(each)
    spans, slots = [], []
    for way in WAYS:
        skipped, normalize = way.get("skipped", 0), way.get("normalize", engine.heads.base.pooling.normalize)
        head = engine.heads.choose(way.get("pooling"), normalize=normalize, skips=skipped > 0)
        for adapter in adapters:
            spans += [TokenSpan(ids, 0, head, skipped=skipped * head.pooling.skips) for ids in draw(*LENGTHS)]
            slots += [None if adapter is None else engine.slot_of(adapter)] * len(LENGTHS)
    step = engine.runner.launch(spans, slots)
    step.wait()
    results = dict(result for group in step.groups for result in group.results())
    vectors = np.asarray([results[i] for i in range(len(spans))]).reshape(-1, len(LENGTHS), 128)
    return list(vectors)


def one_by_one(engine: Engine, adapters: list[AdapterRef | None]) -> list[NDArray[np.float32]]:
    return [ask(engine, draw(*LENGTHS), adapter, **way).result for way in WAYS for adapter in adapters]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_a_step_mixes_ways_to_pool(
    pooling: Literal["last", "mean", "cls"], normalize: bool, make_engine: MakeEngine,
    adapter_specs: list[AdapterSpec], tmp_path: Path,
) -> None:  # fmt: skip
    """The base model's own way is one of them, or another."""
    folder, adapters = make_model(tmp_path / "model", pooling=pooling, normalize=normalize), owners(adapter_specs)
    engine = make_engine(folder)
    engine.start()
    alone, mixed = one_by_one(engine, adapters), one_step(engine, adapters)
    for way, ours, theirs in zip([way for way in WAYS for _ in adapters], mixed, alone, strict=True):
        vectors = ours[:, : way.get("dimensions")]
        if way.get("normalize", normalize):
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, theirs, atol=2e-6, rtol=1e-4)
    plain, raw = alone[0], alone[len(adapters)]
    assert np.allclose(np.linalg.norm(plain, axis=1), 1) == normalize
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_texts_run_beside_ways_to_pool(
    pooling: Literal["last", "mean"], make_engine: MakeEngine, adapter_specs: list[AdapterSpec], tmp_path: Path
) -> None:
    """Prompts of the last token are divided, others are not."""
    folder, adapters = make_model(tmp_path / "model", pooling=pooling), owners(adapter_specs)
    small = {"max_batch_tokens": 100, "max_model_len": 400, "kv_cache_bytes": 8 << 20, "slots": 3}
    engine = make_engine(folder, **small)
    engine.start()
    alone, sink = one_by_one(engine, adapters), TextSink()
    engine.submit(draw(20), adapters[1], GREEDY, sink)
    text = sink.generation().choices[0].tokens.tolist()
    sinks, most = [TextSink() for _ in range(4)], engine.limits.max_embedding_len
    with engine.paused():
        for each in sinks:
            engine.submit(draw(20), adapters[1], GREEDY, each)
        long = [submit(engine, draw(most), None, normalize=flag) for flag in (True, False)]
        mixed = [submit(engine, draw(*LENGTHS), adapter, **way) for way in WAYS for adapter in adapters]
    for future, theirs in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(future.result(PATIENCE_S).result, theirs, atol=2e-6, rtol=1e-4)
    assert [each.generation().choices[0].tokens.tolist() for each in sinks] == [text] * 4
    vectors, raw = (each.result(PATIENCE_S).result for each in long)
    assert_same(vectors, raw / np.linalg.norm(raw))


def test_whole_prompts_are_as_long_as_a_step(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=100, max_model_len=400, kv_cache_bytes=16 << 20)
    engine.start()
    assert engine.limits.longest_embedding(reads_last=False) == 100
    assert ask(engine, draw(100), pooling="mean").result.shape == (1, 128)
    with pytest.raises(InvalidRequest, match="expected 1 to 100 tokens, got 101"):
        engine.submit(draw(101), None, EmbedParams(pooling="mean"), AnswerSink(print))
    assert ask(engine, draw(101), pooling="last").result.shape == (1, 128)
