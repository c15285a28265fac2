"""Adapters with rows of their own for some tokens answer as PEFT computes them, in the same batches as others."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.kernels.token_rows import PAGE
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.broken import edit_config, edit_weights
from tests.assets.make import make_model
from tests.assets.oracle import cosine, reference_embedding
from tests.assets.text_oracle import reference_logprobs
from tests.assets.token_rows import (
    ADAPTERS,
    IDS,
    NEW_IDS,
    OTHER_IDS,
    RESIZED,
    save_resized_adapter,
    save_token_adapter,
)
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, generate

FIELDS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "text": True,
}  # fmt: skip
NEW_PROMPT: NDArray[np.int32] = np.array([*range(40, 50), *NEW_IDS, 12, 1030, 45, 1029], dtype=np.int32)
PROMPT: NDArray[np.int32] = np.array([*range(40, 50), *IDS, *OTHER_IDS, 12, 45], dtype=np.int32)


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / f"token-rows-{request.param}" / "model"
    is_tied = request.param == "tied"
    fields = {**FIELDS, "architecture": "qwen3" if is_tied else "llama", "tied": is_tied}
    return folder if folder.exists() else make_model(folder, **fields)


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    made = {name: model.parent / name for name in ADAPTERS}  # may exist: pytest visits a model several times
    return {name: folder if folder.exists() else save_token_adapter(model, folder) for name, folder in made.items()}


def owners(folders: dict[str, Path]) -> list[Path | None]:
    return [None, *folders.values()]


def engine_of(model: Path, **fields: Any) -> Engine:
    settings = {"slots": 24, "max_batch_tokens": 4096, "kv_cache_bytes": 8 << 20, "lora_modules": ALL_MODULES}
    engine = Engine(EngineConfig(model, **{**settings, **fields}))
    engine.start()
    return engine


@pytest.fixture(scope="module", params=["native", "merged"])
def engine(model: Path, folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = engine_of(model, backend=request.param)
    for folder in folders.values():
        running.load(ref(folder))
    yield running
    running.stop()


def test_vectors_with_token_rows_equal_those_of_peft(engine: Engine, model: Path, folders: dict[str, Path]) -> None:
    asked = [PROMPT, PROMPT[3:7]]
    with engine.paused():
        found = {each: submit(engine, asked, ref(each) if each else None) for each in owners(folders)}
    for each, answer in found.items():
        assert_same(answer.result(PATIENCE_S).result, reference_embedding(model, each, asked))


def test_logprobs_of_mixed_texts_with_token_rows_equal_those_of_peft(
    engine: Engine, model: Path, folders: dict[str, Path]
) -> None:
    with engine.paused():
        found = {each: _asked(engine, each, PROMPT) for each in owners(folders)}
    seen = set()
    for folder, answer in found.items():
        assert _error(model, folder, PROMPT, answer) <= LOGPROB_ROUNDING, folder
        seen.add(tuple(answer.result(PATIENCE_S).result.prompt_logprobs))
    assert len(seen) == len(found), "two adapters gave the same logprobs"


@pytest.fixture(scope="module")
def resized(model: Path) -> dict[str, Path]:
    made = {name: model.parent / name for name in RESIZED}
    return {name: folder if folder.exists() else save_resized_adapter(model, folder) for name, folder in made.items()}


def test_tokens_beyond_the_vocabulary_of_the_base(
    engine: Engine, model: Path, resized: dict[str, Path], folders: dict[str, Path]
) -> None:
    """In the same batches, rows of the base model and other adapters have no such tokens."""
    asked: dict[Path | None, NDArray[np.int32]] = {folders["tokens"]: PROMPT, None: PROMPT}
    asked.update((folder, NEW_PROMPT) for folder in resized.values())
    for folder in resized.values():
        engine.load(ref(folder))
    with engine.paused():
        vectors = {each: submit(engine, [ids], ref(each) if each else None) for each, ids in asked.items()}
        plain = {each: _asked(engine, each, ids) for each, ids in asked.items()}
        drawn = {each: _asked(engine, each, NEW_PROMPT, logit_bias=((1030, 90.0),)) for each in resized.values()}
    for each, ids in asked.items():
        assert_same(vectors[each].result(PATIENCE_S).result, reference_embedding(model, each, [ids]))
        assert _error(model, each, ids, plain[each]) <= LOGPROB_ROUNDING, each
    for folder, answer in drawn.items():
        assert answer.result(PATIENCE_S).result.choices[0].tokens.tolist() == [1030] * 6
        assert _error(model, folder, NEW_PROMPT, answer) <= LOGPROB_ROUNDING


def test_sampling_knows_the_new_tokens(engine: Engine, resized: dict[str, Path]) -> None:
    folder = resized["resized"]
    only = _asked(engine, folder, NEW_PROMPT, allowed_token_ids=(1030, 1039), temperature=1.0, seed=1, top_p=0.99)
    assert set(only.result(PATIENCE_S).result.choices[0].tokens.tolist()) <= {1030, 1039}
    once = _asked(engine, folder, NEW_PROMPT, logit_bias=((1028, 95.0), (1027, 60.0)), repetition_penalty=1000)
    assert once.result(PATIENCE_S).result.choices[0].tokens.tolist()[:2] == [1028, 1027]
    ended = _asked(engine, folder, NEW_PROMPT, logit_bias=((1030, 90.0),), stop_token_ids=(1030,), min_tokens=0)
    assert ended.result(PATIENCE_S).result.choices[0].stop_token == 1030


def test_new_tokens_beside_a_grammar_change_no_text(engine: Engine, resized: dict[str, Path]) -> None:
    """A grammar allows only tokens of the base model."""
    grammar = Grammar("regex", "[0-9]{2}")
    folder, found = resized["resized"], []
    for params in ({}, {"stop_token_ids": (1030, 1279)}, {"allowed_token_ids": (*range(1024), 1030, 1279)}):
        answer = _asked(engine, folder, NEW_PROMPT, grammar=grammar, ignore_eos=False, **params)
        found.append(answer.result(PATIENCE_S).result.choices[0].tokens.tolist())
    assert found[0] == found[1] == found[2]


def test_tokens_that_the_adapter_does_not_have_are_refused(
    engine: Engine, model: Path, folders: dict[str, Path], resized: dict[str, Path]
) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 1023, got 1039"):
        submit(engine, [NEW_PROMPT])
    with pytest.raises(InvalidRequest, match="from 0 to 1279, got 1280"):
        submit(engine, [np.array([1280], dtype=np.int32)], ref(resized["resized"]))
    for folder, known in ((folders["plain"], 1023), (resized["resized"], 1039)):
        ids = np.array([5, 1100], dtype=np.int32)
        for refused in (submit(engine, [ids], ref(folder)), _asked(engine, folder, ids)):
            with pytest.raises(InvalidRequest, match=f"from 0 to {known} for this adapter, got 1100"):
                refused.result(PATIENCE_S)
        found = submit(engine, [PROMPT], ref(folder)).result(PATIENCE_S).result
        assert_same(found, reference_embedding(model, folder, [PROMPT]))


def test_logprobs_of_tokens_of_which_the_head_has_no_row(engine: Engine, model: Path, tmp_path: Path) -> None:
    """Such as of an adapter that was trained without a head, or whose file leaves it out."""
    folder = save_resized_adapter(model, tmp_path / "resized", modules_to_save=["embed_tokens"])
    edit_weights(folder, _without("lm_head"))
    vectors = submit(engine, [NEW_PROMPT], ref(folder)).result(PATIENCE_S).result
    assert_same(vectors, reference_embedding(model, folder, [NEW_PROMPT]))
    text = _asked(engine, folder, NEW_PROMPT, prompt_logprobs=None).result(PATIENCE_S).result.choices[0]
    assert len(text.tokens) == 6
    assert max(text.tokens) < 1024
    with pytest.raises(InvalidAdapter, match="its head has no row of a token"):
        _asked(engine, folder, NEW_PROMPT).result(PATIENCE_S)


def _asked(engine: Engine, folder: Path | None, prompt: NDArray[np.int32], **params: Any) -> Future[Answer]:
    settings = {"logprobs": 5, "prompt_logprobs": 0, **params}
    return generate(engine, [prompt], ref(folder) if folder else None, 6, **settings)


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Engine]:
    """An engine of one slot, with room for the rows of one adapter."""
    running = engine_of(model, slots=1, token_rows=2 * PAGE)
    yield running
    running.stop()


def test_an_adapter_leaves_no_rows_in_its_slot(small: Engine, model: Path, folders: dict[str, Path]) -> None:
    for name in ("tokens-of-both", "plain", "embedding", "tokens-of-head", "plain", "tokens-of-both"):
        folder = folders[name]
        vectors = submit(small, [PROMPT], ref(folder)).result(PATIENCE_S).result
        assert_same(vectors, reference_embedding(model, folder, [PROMPT]))
        assert _error(model, folder, PROMPT, _asked(small, folder, PROMPT)) <= LOGPROB_ROUNDING


def test_more_rows_than_the_server_keeps_are_refused_with_both_sizes(small: Engine, folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidAdapter, match=r"(1024|2048) rows differ from .* MB; this server keeps 32 .* MB"):
        small.load(ref(folders["all-rows"]))


Change = Callable[[dict[str, torch.Tensor]], object]


def _first(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(weights) if part in key)
        weights[key] = change(weights[key]).contiguous()

    return edit


def _without(part: str) -> Change:
    return lambda weights: [weights.pop(key) for key in list(weights) if part in key]


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 1] = float("nan")
    return tensor


def _nothing(weights: dict[str, torch.Tensor]) -> None:
    pass


PREFIX = "base_model.model.model"
DELTA, EMBEDDING = "trainable_tokens_delta", "embed_tokens.weight"
REFUSED: dict[str, tuple[str, Change, dict[str, Any], str]] = {
    "fewer": ("tokens", _first(DELTA, lambda rows: rows[1:]), {}, "expected shape [6, 64], got [5, 64]"),
    "narrow": ("tokens", _first(DELTA, lambda rows: rows[:, 1:]), {}, "expected shape [6, 64], got [6, 63]"),
    "integers": ("tokens", _first(DELTA, lambda rows: rows.int()), {}, "got I32"),
    "nan": ("tokens", _first(DELTA, _nan), {}, "trainable_tokens_delta: expected numbers finite in float32"),
    "missing": ("tokens", _without(DELTA), {}, "expected trainable_tokens_delta of embed_tokens, the file has none"),
    "unnamed": (
        "tokens",
        _nothing,
        {"trainable_token_indices": None},
        "trainable_token_indices leaves out embed",
    ),
    "beyond": (
        "tokens",
        _nothing,
        {"trainable_token_indices": [1, 2, 3, 4, 5, 1280]},
        "256 more (engine.added_tokens), got 1280",
    ),
    "negative": ("tokens", _nothing, {"trainable_token_indices": [1, 2, 3, 4, 5, -1]}, "ids from 0 to 1023, and 256"),
    "twice": (
        "tokens",
        _nothing,
        {"trainable_token_indices": [1, 2, 3, 4, 2, 5]},
        "each id once, got 2 more than once",
    ),
    "no-list": ("tokens", _nothing, {"trainable_token_indices": [1.5]}, "expected a list of token ids"),
    "module": ("tokens", _nothing, {"trainable_token_indices": {"norm": [1]}}, "got some for norm"),
    "of-a-matrix-with-lora": (
        "lora-and-head",
        lambda weights: weights.update({f"{PREFIX}.embed_tokens.token_adapter.{DELTA}": torch.ones(1, 64)}),
        {"trainable_token_indices": [1]},
        "embed_tokens has LoRA too",
    ),
    "invocation": ("tokens", _nothing, {"alora_invocation_tokens": [5, 6]}, "not supported beside trained rows"),
    "in-both-fields": (
        "tokens",
        _nothing,
        {"modules_to_save": ["embed_tokens"]},
        "is in modules_to_save too",
    ),
    "no-matrix": ("head", _without("lm_head.weight"), {}, "modules_to_save: expected the weights of lm_head"),
    "matrix-shape": ("embedding", _first(EMBEDDING, lambda rows: rows[:-1]), {}, "its vocabulary differs"),
    "matrix-dtype": ("embedding", _first(EMBEDDING, lambda rows: rows.int()), {}, "got I32"),
    "matrix-nan": ("embedding", _first(EMBEDDING, _nan), {}, "embed_tokens.weight: expected numbers finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_do_not_fit_are_refused_by_name(
    name: str, small: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    kind, change, fields, says = REFUSED[name]
    folder = shutil.copytree(folders[kind], tmp_path / name)
    edit_config(edit_weights(folder, change), **fields)
    with pytest.raises(InvalidAdapter) as refused:
        small.load(ref(folder))
    assert says in refused.value.message


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_and_graphs_have_the_rows_of_tokens(
    dtype: str, model: Path, folders: dict[str, Path], resized: dict[str, Path]
) -> None:
    """Texts come three times, so that the last time their steps are replayed from CUDA graphs."""
    engine = engine_of(model, backend="csgmv", dtype=dtype)
    asked = dict.fromkeys(owners(folders), PROMPT)
    asked.update((folder, NEW_PROMPT) for folder in resized.values())
    try:
        for _ in range(3):
            with engine.paused():
                found = {each: _asked(engine, each, ids) for each, ids in asked.items()}
            errors = {each: _error(model, each, ids, found[each]) for each, ids in asked.items()}
            rounding = 1e-3 if dtype == "float32" else 0.02 + 3 * max(errors[None], errors[folders["plain"]])
            assert max(errors.values()) < rounding, errors
        for folder, ids in asked.items():
            (vector,) = submit(engine, [ids], ref(folder) if folder else None).result(PATIENCE_S).result
            (wanted,) = reference_embedding(model, folder, [ids])
            assert cosine(vector, wanted) > (0.99999 if dtype == "float32" else 0.99)
    finally:
        engine.stop()


def _error(model: Path, folder: Path | None, asked: NDArray[np.int32], answer: Future[Answer]) -> float:
    """Return the largest error of a logprob: of the text's tokens, of those of the prompt, or of the best ones."""
    made = answer.result(PATIENCE_S).result
    (choice,) = made.choices
    tokens = np.concatenate([asked, choice.tokens])
    table = reference_logprobs(model, folder, tokens)
    ours = [each.logprob for each in (*made.prompt_logprobs[0], *choice.logprobs)]
    errors = [np.abs(np.array(ours) - table[np.arange(len(ours)), tokens[1:]]).max()]
    for each, wanted in zip(choice.logprobs, table[len(asked) - 1 : -1], strict=True):
        errors += [abs(logprob - wanted[token]) for token, logprob in each.top]
        errors.append(abs(max(logprob for _, logprob in each.top) - wanted.max()))
    return float(max(errors))
