"""Text on a GPU: replayed graphs give the bits of eager launches, and decodes the logprobs of prompts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench.shapes import decoder, write_adapters, write_model
from tests.replicas.asking import PATIENCE_S, ref, submit
from tests.replicas.streaming import TextSink, draw
from tests.replicas.text_scene import checked_engine

pytestmark = pytest.mark.gpu
SHAPE = decoder(
    "Qwen3ForCausalLM", layers=3, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, vocab=1024
)
GREEDY = GenerateParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=5)
LENGTHS = (5, 64, 65, 300, 17, 130, 1, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("text")
    write_model(made / "model", SHAPE)
    write_adapters(made / "all", 3, shape=SHAPE, rank=16, modules=LINEAR_MODULES)
    write_adapters(made / "some", 2, shape=SHAPE, rank=64, modules=("q_proj", "down_proj"))
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    config = EngineConfig(
        folder / "model", slots=5, max_batch_tokens=2048, max_model_len=1024, max_batch_requests=64,
        kv_cache_bytes=256 << 20, decode_slowdown=1.0, prefix_cache=False,
    )  # fmt: skip
    with checked_engine(config) as running:
        yield running


def adapters(folder: Path) -> list[AdapterRef | None]:
    return [None, *(ref(path, f"{path.parent.name}-{path.name}") for path in sorted(folder.glob("*/ad*")))]


def texts(engine: Engine, folder: Path, params: GenerateParams) -> list[Generation]:
    """Return the texts of all prompts, with the adapters in turn. The planner sees all prompts at once."""
    used = adapters(folder)
    sinks = [TextSink() for _ in LENGTHS]
    for ref_ in used:
        if ref_ is not None:
            engine.load(ref_)
    with engine.paused():
        for i, (prompt, sink) in enumerate(zip(draw(*LENGTHS), sinks, strict=True)):
            engine.submit([prompt], used[i % len(used)], params, sink)
    return [sink.generation() for sink in sinks]


def values(generation: Generation) -> list[float]:
    (choice,) = generation.choices
    return [each.logprob for each in choice.logprobs or ()]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=1.0, seed=3),
        replace(GREEDY, temperature=0.8, seed=3, top_p=0.9, presence_penalty=0.5, logit_bias=((7, 2.0),)),
    ],
)
def test_replayed_steps_equal_eager_ones_bit_for_bit(engine: Engine, folder: Path, params: GenerateParams) -> None:
    for _ in range(3):
        replayed = texts(engine, folder, params)
    graphs = engine.runner.graphs
    assert graphs is not None
    assert len(graphs)
    engine.runner.graphs = None
    try:
        eager = texts(engine, folder, params)
    finally:
        engine.runner.graphs = graphs
    for ours, theirs in zip(replayed, eager, strict=True):
        assert ours.choices[0].tokens.tolist() == theirs.choices[0].tokens.tolist()
        assert values(ours) == values(theirs)


def test_logprobs_of_decodes_are_those_of_a_prompt(engine: Engine, folder: Path) -> None:
    used = adapters(folder)
    made = texts(engine, folder, GREEDY)
    for i, (prompt, text) in enumerate(zip(draw(*LENGTHS), made, strict=True)):
        sink = TextSink()
        whole = np.concatenate([prompt, text.choices[0].tokens])
        engine.submit([whole], used[i % len(used)], replace(GREEDY, max_tokens=1, prompt_logprobs=0), sink)
        scored = sink.generation().prompt_logprobs
        assert scored is not None
        as_prompt = [each.logprob for each in scored[0][-GREEDY.max_tokens :]]
        np.testing.assert_allclose(values(text), as_prompt, atol=6e-2)


def test_texts_do_not_depend_on_the_prefix_cache(engine: Engine, folder: Path) -> None:
    config = replace(engine.config, prefix_cache=True)
    sharing = Engine(config)
    sharing.start()
    try:
        cold, warm = texts(sharing, folder, GREEDY), texts(sharing, folder, GREEDY)
        sharing.check_integrity()
    finally:
        sharing.stop()
    assert sum(each.cached_tokens for each in warm) > sum(each.cached_tokens for each in cold)
    for ours, theirs in zip(warm, cold, strict=True):
        np.testing.assert_allclose(values(ours)[:1], values(theirs)[:1], atol=6e-2)


def test_short_prompts_that_join_many_texts_are_computed_as_alone(engine: Engine, folder: Path) -> None:
    """Their steps are padded to as many tokens as decodes."""
    used = adapters(folder)
    for ref_ in used:
        if ref_ is not None:
            engine.load(ref_)
    prompts = draw(*[3 + i % 9 for i in range(60)])
    params = replace(GREEDY, max_tokens=200)
    alone = []
    for i, prompt in enumerate(prompts):
        sink = TextSink()
        engine.submit([prompt], used[i % len(used)], replace(params, max_tokens=1), sink)
        alone.append(values(sink.generation()))
    for _ in range(3):  # graphs are captured at the second time
        sinks = [TextSink() for _ in prompts]
        for i, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
            engine.submit([prompt], used[i % len(used)], params, sink)
        for sink, expected in zip(sinks, alone, strict=True):
            np.testing.assert_allclose(values(sink.generation())[:1], expected, atol=6e-2)


def test_ways_to_pool_are_computed_as_alone_in_replayed_steps(engine: Engine, folder: Path) -> None:
    ways: list[dict[str, Any]] = [
        {}, {"pooling": "mean"}, {"pooling": "mean", "skipped": 3}, {"pooling": "cls", "skipped": 2},
        {"normalize": False},
    ]  # fmt: skip
    used = adapters(folder)
    asked = [(draw(*LENGTHS[:4]), used[i % len(used)], way) for i, way in enumerate(2 * ways)]
    alone = [submit(engine, prompts, adapter, **way).result(PATIENCE_S).result for prompts, adapter, way in asked]
    for texts_run in (False, False, False, True, True, True):  # graphs are captured at the second time
        sinks = [TextSink() for _ in range(40 * texts_run)]
        for sink in sinks:
            engine.submit(draw(20), None, replace(GREEDY, max_tokens=100), sink)
        with engine.paused():
            mixed = [submit(engine, prompts, adapter, **way) for prompts, adapter, way in asked]
        for future, theirs in zip(mixed, alone, strict=True):
            # A way to pool that is not the one asked for is at a distance of about 1.
            distance = np.linalg.norm(future.result(PATIENCE_S).result - theirs, axis=1)
            np.testing.assert_array_less(distance, 0.03 * np.linalg.norm(theirs, axis=1))
        assert all(len(sink.generation().choices[0].tokens) == 100 for sink in sinks)
