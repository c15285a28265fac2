"""Texts in float32 are those of transformers + PEFT, token for token, however the work is cut, mixed and repeated."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ranklet.kernels.paged_spans import PAGE_TOKENS
from ranklet.replicas.engine import step_cost
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.model.architecture import read_architecture, read_config
from tests.assets.families import FAMILIES, LENGTHS, MAX_TOKENS
from tests.assets.oracle import reference_embedding
from tests.assets.text_oracle import reference_text
from tests.replicas.asking import PATIENCE_S, assert_same, submit
from tests.replicas.text_scene import LOGPROB_ERROR, TextScene, check, generate, make_scene, request

MakeEngine = Callable[..., Engine]
MAX_MODEL_LEN = 256
LONGEST_PAGES = MAX_MODEL_LEN // PAGE_TOKENS
# Attention differs between these two only: the other families differ from them in what each token computes alone.
of_each_attention = pytest.mark.parametrize("scene", ["qwen3", "mistral"], indirect=True)


class TokenCounter(Listener):
    """Counts the tokens of prompts and texts that steps compute."""

    tokens = 0

    def batch(self, record: BatchRecord) -> None:
        self.tokens += record.tokens + record.generated


@pytest.fixture(scope="session", params=FAMILIES)
def scene(request: pytest.FixtureRequest, families_dir: Path) -> TextScene:
    return make_scene(families_dir, request.param)


@pytest.fixture
def start_engine(make_engine: MakeEngine, scene: TextScene) -> MakeEngine:
    """Return a function that starts engines; by default with a slot for each adapter."""

    def start(listener: Listener | None = None, **fields: object) -> Engine:
        engine = make_engine(scene.model, listener, **{"slots": 6, "max_model_len": MAX_MODEL_LEN, **fields})
        engine.start()
        return engine

    return start


@of_each_attention
def test_texts_one_at_a_time(scene: TextScene, start_engine: MakeEngine) -> None:
    engine = start_engine(slots=2)
    for asked in scene.all()[::9]:  # each adapter, and each length of the prompt but one
        check(asked, request(engine, asked))
    engine.check_integrity()


def test_texts_of_all_adapters_beside_embeddings(
    scene: TextScene, start_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings arrive one after the other while texts run, so that steps have both, and odd chunks of prompts."""
    monkeypatch.setattr(step_cost, "LEAST_PIECE", 37)
    engine = start_engine(decode_slowdown=1.0, prefix_cache=False)
    asked_texts = [asked.first(30) for asked in scene.all()]
    early, late = asked_texts[::2], asked_texts[1::2]
    with engine.paused():
        texts = [request(engine, asked) for asked in early]
    vectors = []
    for place, adapter in enumerate(scene.adapters):
        vectors.append(submit(engine, scene.prompts[place:][:2], adapter).result(PATIENCE_S).result)
        texts += [request(engine, asked) for asked in late[4 * place :][:4]]
    for asked, text in zip(early + late, texts, strict=True):
        check(asked, text)
    for place, (adapter, ours) in enumerate(zip(scene.adapters, vectors, strict=True)):
        folder = Path(adapter.path) if adapter else None
        assert_same(ours, reference_embedding(scene.model, folder, scene.prompts[place:][:2]))
    engine.check_integrity()


@of_each_attention
def test_texts_that_are_preempted(scene: TextScene, start_engine: MakeEngine) -> None:
    """With few pages sequences lose theirs, since all adapters are loaded and all texts start together."""
    counter, rng, least = TokenCounter(), random.Random(scene.family), 0
    for pages in (LONGEST_PAGES, LONGEST_PAGES + 1, LONGEST_PAGES + 3):
        kv_cache_bytes = pages * page_bytes(scene)
        engine = start_engine(counter, kv_cache_bytes=kv_cache_bytes, prefix_cache=False, decode_slowdown=1.0)
        for adapter in filter(None, scene.adapters):
            engine.load(adapter)
        chosen = rng.sample(scene.all(), 6)
        with engine.paused():
            texts = [request(engine, asked) for asked in chosen]
        for asked, text in zip(chosen, texts, strict=True):
            check(asked, text)
        least += sum(len(asked.prompt) + MAX_TOKENS for asked in chosen)
        engine.check_integrity()
    assert counter.tokens > least, "nothing was computed twice, so nothing was preempted"


def page_bytes(scene: TextScene) -> int:
    shape = read_architecture(read_config(scene.model))
    return shape.layers * 2 * shape.kv_heads * PAGE_TOKENS * shape.head_dim * 4


@of_each_attention
def test_texts_with_a_warm_prefix_cache(scene: TextScene, start_engine: MakeEngine) -> None:
    engine = start_engine()
    long = [asked for asked in scene.all() if len(asked.prompt) > PAGE_TOKENS]
    cold, warm = [asked.first(48) for asked in long], [asked.first(8) for asked in long]
    for part in (cold, warm, [asked.rest(48) for asked in long]):
        texts = [request(engine, asked) for asked in part]
        for asked, text in zip(part, texts, strict=True):
            found = check(asked, text)
            if part is not cold:
                assert found.cached_tokens == (len(asked.prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    engine.check_integrity()


@of_each_attention
def test_equal_prompts_under_every_adapter_share_no_page(scene: TextScene, start_engine: MakeEngine) -> None:
    engine = start_engine()
    for asked in scene.all():
        if len(asked.prompt) == max(LENGTHS):
            assert check(asked.first(4), request(engine, asked.first(4))).cached_tokens == 0


def test_a_real_model_answers_and_stops(smollm_dir: Path, make_engine: MakeEngine) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    engine = make_engine(smollm_dir, max_model_len=MAX_MODEL_LEN, dtype="float32")
    engine.start()
    prompt = np.array(asked, dtype=np.int32)
    (choice,) = generate(engine, [prompt], None, 40, ignore_eos=False).result(PATIENCE_S).result.choices
    (expected,) = reference_text(smollm_dir, None, [prompt], 40, ignore_eos=False)
    np.testing.assert_array_equal(choice.tokens, expected.tokens)
    assert choice.finish_reason == "stop"
    assert tokenizer.decode(choice.tokens) == "The capital of France is Paris.<|im_end|>"


def test_logprobs_of_a_text_as_a_prompt(scene: TextScene, start_engine: MakeEngine) -> None:
    engine = start_engine()
    asked = [each for each in scene.all() if len(each.prompt) == 40]
    wholes = [np.concatenate([each.prompt, each.expected.tokens]) for each in asked]
    answers = [
        generate(engine, [whole], each.adapter, 1, prompt_logprobs=0) for each, whole in zip(asked, wholes, strict=True)
    ]
    for each, answer in zip(asked, answers, strict=True):
        (found,) = answer.result(PATIENCE_S).result.prompt_logprobs
        ours = np.array([logprob.logprob for logprob in found])
        assert len(ours) == len(each.prompt) + MAX_TOKENS - 1
        np.testing.assert_allclose(ours[len(each.prompt) - 1 :], each.expected.logprobs, rtol=0, atol=LOGPROB_ERROR)
