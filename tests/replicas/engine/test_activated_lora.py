"""aLoRA adapters answer as PEFT computes them, and share what is before their invocation with the base model."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import AdapterChanged, InvalidAdapter, InvalidRequest
from tests.assets.adapters import LINEAR, save_adapter
from tests.assets.broken import edit_config
from tests.assets.make import make_model
from tests.assets.text_oracle import chosen_logprobs, reference_model, reference_text
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref
from tests.replicas.streaming import TextSink
from tests.replicas.text_scene import LOGPROB_ROUNDING, AskedText, check, generate, request

TOKENS = 6
MERGED_ROUNDING = 5e-5  # on one processor, merged weights are 2.6e-5 from float64, and PEFT is 0.7e-5
ONE, TWO = (7, 8, 9), (11, 12)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": list(LINEAR)},
    "one": {"target_modules": list(LINEAR), "alora_invocation_tokens": list(ONE)},
    "two": {"target_modules": ["k_proj", "down_proj"], "alora_invocation_tokens": list(TWO), "lora_bias": True},
    "head": {"target_modules": ["v_proj", "lm_head"], "alora_invocation_tokens": list(ONE)},
}
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "text": True,
    "architecture": "llama", "tied": False, "pooling": None,
}  # fmt: skip
PAGE_BYTES = 2 * 2 * 2 * 64 * 32 * 4  # layers, keys and values, heads, tokens, width, bytes
PLACES = (0, 1, 30, 62, 63, 64, 65, 200)  # of the invocation; pages have 64 tokens


def tokens_of(length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng((length, seed)).integers(20, 1000, length, dtype=np.int32)


def invoked(length: int, *places: int, invocation: tuple[int, ...] = ONE, seed: int = 0) -> NDArray[np.int32]:
    """Return a prompt with an invocation at some places."""
    ids = tokens_of(length, seed)
    for place in places:
        ids[place : place + len(invocation)] = invocation
    return ids


PROMPTS = [
    *(invoked(place + 8, place) for place in PLACES), invoked(90, 10, 70), invoked(140, 20, 137),
    invoked(80, 60, invocation=TWO), invoked(70, 5, invocation=ONE[:2]), tokens_of(66),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("activated") / "model", **SHAPE)


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    return {name: save_adapter(model, model.parent / name, **_recipe(name)) for name in ADAPTERS}


def engine_of(model: Path, **fields: Any) -> Engine:
    modules = (*EngineConfig(model).lora_modules, "lm_head")
    settings = {"slots": 8, "max_batch_tokens": 512, "kv_cache_bytes": 8 << 20, "lora_modules": modules, **fields}
    engine = Engine(EngineConfig(model, **settings))
    engine.start()
    return engine


@pytest.fixture(scope="module", params=["native", "merged"])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = engine_of(model, backend=request.param)
    yield running
    running.check_integrity()
    running.stop()


@pytest.fixture(scope="module")
def asked(model: Path, folders: dict[str, Path]) -> list[AskedText]:
    """Return each prompt for each adapter, those of all adapters in turn, and the texts that PEFT generates."""
    texts = [
        [
            AskedText(None if folder is None else ref(folder), prompt, text)
            for prompt, text in zip(PROMPTS, made, strict=True)
        ]
        for folder in (None, *folders.values())
        for made in (reference_text(model, folder, PROMPTS, TOKENS),)
    ]
    return [each for prompt in zip(*texts, strict=True) for each in prompt]


def test_texts_of_mixed_batches_equal_those_of_peft(engine: Engine, asked: list[AskedText]) -> None:
    """Prompts are computed in pieces, because a step has 512 tokens; the second time most pages are cached."""
    rounding = MERGED_ROUNDING if engine.config.backend == "merged" else LOGPROB_ROUNDING
    for _ in range(2):
        with engine.paused():
            found = [(each, request(engine, each)) for each in asked]
        for each, answer in found:
            (choice,) = check(each, answer).choices
            ours = np.array([token.logprob for token in choice.logprobs or ()])
            np.testing.assert_allclose(ours, each.expected.logprobs, rtol=0, atol=rounding)


def test_only_prompts_with_the_invocation_have_texts_of_the_adapter(asked: list[AskedText]) -> None:
    texts = {(each.adapter and each.adapter.name, each.prompt.tobytes()): each.expected.logprobs for each in asked}
    for prompt in PROMPTS:
        base, one, plain = (texts[name, prompt.tobytes()] for name in (None, "one", "plain"))
        has_invocation = any(tuple(prompt[at : at + len(ONE)]) == ONE for at in range(len(prompt)))
        assert np.allclose(one, base, rtol=0, atol=LOGPROB_ROUNDING) is not has_invocation
        assert not np.allclose(one, plain, rtol=0, atol=0.01)


def test_a_text_that_contains_the_invocation_activates_nothing(engine: Engine, model: Path, tmp_path: Path) -> None:
    """Neither while it is generated, nor when it goes on from tokens that another engine has made."""
    (made,) = reference_text(model, None, [PROMPTS[-1]], 20)
    own = made.tokens[2:4].tolist()
    folder = save_adapter(model, tmp_path / "own", **_recipe("one", alora_invocation_tokens=own))
    (peft,) = reference_text(model, folder, [PROMPTS[-1]], 20)
    assert peft.tokens.tolist() == made.tokens.tolist()
    asked = AskedText(ref(folder), PROMPTS[-1], peft)
    check(asked, request(engine, asked))
    sink = TextSink()
    params = GenerateParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    engine.submit([asked.prompt], asked.adapter, params, sink, given=[peft.tokens[:10]])
    assert sink.generation().choices[0].tokens.tolist() == peft.tokens.tolist()


def test_pages_before_the_invocation_are_those_of_the_base(engine: Engine, folders: dict[str, Path]) -> None:
    one, two = ref(folders["one"]), ref(folders["two"])

    def cached(prompt: NDArray[np.int32], adapter: AdapterRef | None, **params: Any) -> int:
        made: Generation = generate(engine, [prompt], adapter, 1, **params).result(PATIENCE_S).result
        return made.cached_tokens

    prompt = invoked(400, 200, seed=1)
    assert cached(prompt, None) == 0
    assert cached(prompt, one) == 192, "the whole pages before the invocation"
    assert cached(prompt, one) == 384
    assert cached(prompt, None) == 384
    assert cached(prompt, two) == 384, "its invocation is not in the prompt"
    assert cached(np.concatenate([prompt[:200], ONE, ONE, prompt[206:]]), one) == 192, "it begins at another place"
    assert cached(prompt, ref(folders["plain"])) == 0
    assert cached(prompt, one, cache_salt="tenant") == 0
    short = invoked(60, 50, seed=3)
    text = generate(engine, [short], one, 80).result(PATIENCE_S).result.choices[0].tokens
    assert cached(np.concatenate([short, text]), None) == 0, "the page has tokens of the adapter"
    assert cached(np.concatenate([short, text]), one) == 128
    converse = invoked(300, 128, seed=2)
    assert cached(converse, one) == 0
    assert cached(converse, None) == 128
    assert cached(np.concatenate([converse[:128], TWO, converse[130:]]), two) == 128


def test_choices_and_given_tokens_of_a_text(engine: Engine, asked: list[AskedText]) -> None:
    for each in (each for each in asked if each.adapter is not None and each.adapter.name == "one"):
        params = GenerateParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, n=2)
        sink = TextSink()
        known = [each.expected.tokens[:2], each.expected.tokens[:0]]
        engine.submit([each.prompt], each.adapter, params, sink, given=known)
        wanted = each.expected.tokens.tolist()
        assert [choice.tokens.tolist() for choice in sink.generation().choices] == [wanted, wanted]


def test_logprobs_of_prompts_equal_those_of_peft(engine: Engine, model: Path, folders: dict[str, Path]) -> None:
    prompts = [invoked(300, 150), invoked(90, 64), invoked(70, 69 - len(ONE)), tokens_of(40)]
    with engine.paused():
        found = {
            name: generate(engine, prompts, ref(folders[name]), 1, prompt_logprobs=0)
            for name in ("one", "head", "plain")
        }
    for name, answer in found.items():
        for prompt, scores in zip(prompts, answer.result(PATIENCE_S).result.prompt_logprobs, strict=True):
            ours = [each.logprob for each in scores]
            np.testing.assert_allclose(
                ours, chosen_logprobs(model, folders[name], prompt), rtol=0, atol=LOGPROB_ROUNDING
            )


def test_preempted_texts_are_those_of_an_engine_with_space(engine: Engine, folders: dict[str, Path]) -> None:
    """Three texts start in six pages, and then each needs two more."""
    tight = engine_of(engine.config.model_dir, max_model_len=256, kv_cache_bytes=6 * PAGE_BYTES)
    owners = [None, *(ref(folders[name]) for name in ("one", "two", "plain"))]
    for name in ("one", "two", "plain"):
        tight.load(ref(folders[name]))
    prompts = [invoked(56, 20), invoked(57, 54, invocation=TWO)]
    answers = []
    for running in (engine, tight):
        with running.paused():
            answers.append([generate(running, prompts, owner, 80) for owner in owners])
    for wanted, found in zip(*answers, strict=True):
        for one, other in zip(
            wanted.result(PATIENCE_S).result.choices, found.result(PATIENCE_S).result.choices, strict=True
        ):
            assert one.tokens.tolist() == other.tokens.tolist()
    state = tight.snapshot().kv_cache
    assert state is not None
    assert (state.pages, state.preemptions > 0) == (6, True)
    tight.check_integrity()
    tight.stop()


def test_vectors_equal_the_states_of_pefts_causal_model(engine: Engine, model: Path, folders: dict[str, Path]) -> None:
    peft, _ = reference_model(model, folders["one"])
    texts = [generate(engine, [PROMPTS[3]], ref(folders["plain"]), 60) for _ in range(2)]  # beside decodes too
    for prompts in (PROMPTS[:6], PROMPTS):
        wanted = []
        for prompt in prompts:
            with torch.inference_mode():
                states = peft(torch.from_numpy(prompt[None].astype(np.int64)), output_hidden_states=True)
            wanted.append(torch.nn.functional.normalize(states.hidden_states[-1][0, -1], dim=0).numpy())
        assert_same(ask(engine, prompts, ref(folders["one"])).result, np.stack(wanted))
    for text in texts:
        text.result(PATIENCE_S)


def test_vectors_that_cannot_be_computed_in_parts_are_refused(
    engine: Engine, model: Path, folders: dict[str, Path]
) -> None:
    with pytest.raises(InvalidRequest, match=r"alora_invocation_tokens on.* got pooling mean"):
        ask(engine, PROMPTS[:1], ref(folders["one"]), pooling="mean")
    without_pages = engine_of(model, kv_cache_bytes=0)
    with pytest.raises(InvalidRequest, match=r"a replica that generates text; got .*kv_cache_bytes is 0"):
        ask(without_pages, PROMPTS[:1], ref(folders["one"]))
    without_pages.stop()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"alora_invocation_tokens": "<|start|>"}, "expected 1 to 1024 token ids, got '<|start|>'"),
    "empty": ({"alora_invocation_tokens": []}, "expected 1 to 1024 token ids, got []"),
    "true": ({"alora_invocation_tokens": [7, True]}, "expected 1 to 1024 token ids, got [7, True]"),
    "negative": ({"alora_invocation_tokens": [-1]}, "expected 1 to 1024 token ids, got [-1]"),
    "long": ({"alora_invocation_tokens": [7] * 1025}, "expected 1 to 1024 token ids, got [7, 7"),
    "beyond": ({"alora_invocation_tokens": [7, 1024]}, "expected token ids from 0 to 1023, as the base model has"),
    "task": ({"task_type": None}, "expected task_type CAUSAL_LM, since PEFT activates no others, got None"),
    "bias": ({"bias": "all"}, "expected no bias, which changes tokens before the invocation, got 'all'"),
    "rows": ({"trainable_token_indices": [7]}, "expected no trainable_token_indices, which changes tokens before"),
    "saved": ({"modules_to_save": ["lm_head"]}, "expected no modules_to_save, which changes tokens before"),
    "dora": ({"use_dora": True}, "PEFT does not combine it with use_dora"),
    "velora": ({"velora_config": {"num_groups": 4}}, "PEFT does not combine it with velora_config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_does_not_activate_is_refused_by_name(
    name: str, engine: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    fields, says = REFUSED[name]
    folder = edit_config(Path(shutil.copytree(folders["one"], tmp_path / name)), **fields)
    with pytest.raises(InvalidAdapter) as refused:
        engine.load(ref(folder))
    assert f"alora_invocation_tokens: {says}" in refused.value.message


def test_lora_of_the_embedding_is_refused_by_name(engine: Engine, model: Path, tmp_path: Path) -> None:
    folder = save_adapter(model, tmp_path / "embed", r=6, target_modules=["q_proj", "embed_tokens"])
    edit_config(folder, alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    with pytest.raises(InvalidAdapter, match="PEFT does not combine it with LoRA on embed_tokens"):
        engine.load(ref(folder))


def test_an_invocation_that_was_not_read_with_the_revision_is_no_plain_adapter(
    engine: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["one"], tmp_path / "other"))
    with pytest.raises(AdapterChanged):
        engine.load(AdapterRef("other", str(folder), "1"))


def _recipe(name: str, **fields: Any) -> dict[str, Any]:
    return {"r": 6, "task_type": "CAUSAL_LM", **ADAPTERS[name], **fields}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_and_compiled_kernels_answer_as_peft_does(
    dtype: str, model: Path, folders: dict[str, Path], asked: list[AskedText]
) -> None:
    """Texts come three times, so that the last time their steps are replayed from CUDA graphs."""
    engine = engine_of(model, backend="csgmv", dtype=dtype, prefix_cache=False, max_batch_tokens=2048)
    try:
        for _ in range(3):
            with engine.paused():
                found = [(each, request(engine, each)) for each in asked]
            errors: dict[str | None, list[float]] = {}
            for each, answer in found:
                (choice,) = answer.result(PATIENCE_S).result.choices
                ours = [token.logprob for token in choice.logprobs]
                folder = None if each.adapter is None else folders[each.adapter.name]
                whole = np.concatenate([each.prompt, choice.tokens])
                wanted = chosen_logprobs(model, folder, whole, prompt=len(each.prompt))[len(each.prompt) - 1 :]
                errors.setdefault(None if folder is None else folder.name, []).append(
                    float(np.abs(ours - wanted).max())
                )
            worst = {name: max(values) for name, values in errors.items()}
            rounding = 1e-3 if dtype == "float32" else 0.02 + 3 * max(worst[None], worst["plain"])
            assert max(worst.values()) < rounding, worst
    finally:
        engine.stop()
