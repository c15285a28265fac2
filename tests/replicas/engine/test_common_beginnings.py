"""Texts that begin alike, whose common pages attention reads once a group, are those that each has alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.kernels.paged_attention import group_limit
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine import paged_layout
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.prefix_groups import GroupedSpans, group_by_prefix
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench.shapes import decoder, write_adapters, write_model
from tests.replicas.asking import ref
from tests.replicas.streaming import TextSink, draw
from tests.replicas.text_scene import LOGPROB_ROUNDING, checked_engine

TOLERANCE = 6e-2 if torch.cuda.is_available() else LOGPROB_ROUNDING  # bfloat16 on a GPU
HEADS = (4, 2)
SHAPE = decoder(
    "Qwen3ForCausalLM",
    layers=2,
    hidden=256,
    heads=HEADS[0],
    kv_heads=HEADS[1],
    head_dim=64,
    intermediate=512,
    vocab=1024,
)
GREEDY = GenerateParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
OWN = (1, 20, 64, 90, 7, 33, 5, 12, 70, 3)  # tokens behind the system prompt, more prompts than a group has members


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("beginnings")
    write_model(folder / "model", SHAPE)
    write_adapters(folder / "adapters", 2, shape=SHAPE, rank=16, modules=LINEAR_MODULES)
    config = EngineConfig(
        folder / "model", slots=2, max_batch_tokens=2048, max_model_len=4096, max_batch_requests=64,
        kv_cache_bytes=256 << 20, decode_slowdown=1.0,
    )  # fmt: skip
    with checked_engine(config) as running:
        yield running


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[GroupedSpans]:
    """Return the groups of all steps from now on."""
    found: list[GroupedSpans] = []

    def group(*args: Any) -> GroupedSpans:
        spans = group_by_prefix(*args)
        if len(spans.rows):
            found.append(spans)
        return spans

    monkeypatch.setattr(paged_layout, "group_by_prefix", group)
    return found


def submit(engine: Engine, prompt: NDArray[np.int32], adapter: AdapterRef | None, params: GenerateParams) -> TextSink:
    sink = TextSink()
    engine.submit([prompt], adapter, params, sink)
    return sink


def adapters(engine: Engine) -> list[AdapterRef | None]:
    found = [ref(path, path.name) for path in sorted((engine.config.model_dir.parent / "adapters").iterdir())]
    for each in found:
        engine.load(each)
    return [None, *found]


def check(engine: Engine, prompt: NDArray[np.int32], adapter: AdapterRef | None, made: TextSink) -> None:
    """Check that each token's logprob is the one of the whole text as a prompt."""
    for choice in made.generation().choices:
        whole = np.concatenate([prompt, choice.tokens])
        asked = replace(GREEDY, max_tokens=1, prompt_logprobs=0, cache_salt="alone")
        scored = submit(engine, whole, adapter, asked).generation().prompt_logprobs
        assert scored is not None
        as_prompt = [each.logprob for each in scored[0][-len(choice.tokens) :]]
        assert choice.logprobs is not None
        np.testing.assert_allclose([each.logprob for each in choice.logprobs], as_prompt, rtol=0, atol=TOLERANCE)


def test_texts_with_the_system_prompts_of_their_adapters(engine: Engine, groups: list[GroupedSpans]) -> None:
    used, own = adapters(engine), draw(*OWN)
    asked = []
    for adapter, system in zip(used, draw(1200, 1355, 1170), strict=True):
        submit(engine, system, adapter, replace(GREEDY, max_tokens=1)).generation()  # fills the prefix cache
        asked += [(np.concatenate([system, end]), adapter) for end in own]
    for _ in range(3):  # graphs are captured at the second time
        with engine.paused():
            made = [
                submit(engine, prompt, adapter, replace(GREEDY, max_tokens=6 + i % 20))
                for i, (prompt, adapter) in enumerate(asked)
            ]
        for text in made:
            text.generation()
    for (prompt, adapter), text in zip(asked, made, strict=True):
        check(engine, prompt, adapter, text)
    assert max(spans.members.max() for spans in groups) == group_limit(HEADS)


def test_choices_of_one_prompt(engine: Engine, groups: list[GroupedSpans]) -> None:
    (prompt,) = draw(3400)
    text = submit(engine, prompt, None, replace(GREEDY, n=10, temperature=1.0, seed=1))
    check(engine, prompt, None, text)
    assert max(spans.members.max() for spans in groups) == group_limit(HEADS)
