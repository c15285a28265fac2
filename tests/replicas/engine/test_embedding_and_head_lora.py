"""LoRA and DoRA of the token embedding and of the head, which not every adapter of a batch has, on each backend."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.kernels.dispatch import NAMES
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import InvalidAdapter
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.adapters import save_adapter
from tests.assets.broken import edit_weights
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.assets.text_oracle import reference_logprobs
from tests.assets.token_rows import changed_rows, save_resized_adapter
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, generate

MODELS = ("tied", "untied")
PROMPT = np.arange(40, 52, dtype=np.int32)
ADAPTERS: dict[str, dict[str, Any]] = {
    "inner": {"r": 4, "target_modules": ["q_proj"]},
    "embedding": {"r": 5, "target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 3},
    "head": {"r": 6, "target_modules": ["q_proj", "lm_head"], "lora_alpha": 7},
    "both": {
        "r": 4,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "rank_pattern": {"lm_head": 8},
        "alpha_pattern": {"embed_tokens": 2, "lm_head": 20},
    },
    "dora-embedding": {"r": 5, "target_modules": ["embed_tokens"], "use_dora": True},
    "dora-head": {"r": 6, "target_modules": ["q_proj", "lm_head"], "use_dora": True, "lora_alpha": 9},
    "dora-all": {"r": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "bias-of-head": {"r": 4, "target_modules": ["q_proj", "lm_head"], "lora_bias": True},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    is_tied = request.param == "tied"
    return make_model(folder, architecture="llama", tied=is_tied, text=True, layers=2, hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def folders(model: Path) -> list[Path]:
    return [save_adapter(model, model.parent / name, **fields) for name, fields in ADAPTERS.items()]


def engine_of(model: Path, backend: str, dtype: str = "auto") -> Engine:
    config = EngineConfig(
        model, slots=8, max_batch_tokens=1024, kv_cache_bytes=8 << 20, lora_modules=ALL_MODULES, backend=backend,
        dtype=dtype,
    )  # fmt: skip
    engine = Engine(config)
    engine.start()
    return engine


def worst(engine: Engine, model: Path, folders: list[Path]) -> dict[str, float]:
    """Return the largest error of a logprob for each adapter, of texts in the same batches."""
    with engine.paused():
        texts = [generate(engine, [PROMPT], ref(folder), 3, prompt_logprobs=0) for folder in folders]
    errors = {}
    for folder, text in zip(folders, texts, strict=True):
        made = text.result(PATIENCE_S).result
        (choice,) = made.choices
        tokens = np.concatenate([PROMPT, choice.tokens])
        wanted = reference_logprobs(model, folder, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
        ours = [each.logprob for each in (*made.prompt_logprobs[0], *choice.logprobs)]
        errors[folder.name] = float(np.abs(ours - wanted).max())
    return errors


# What tying changes is computed before any backend, and Triton's interpreter takes seconds for each case.
CASES = [(model, backend) for model in MODELS for backend in NAMES if (model, backend) != ("tied", "csgmv")]


@pytest.mark.parametrize(("model", "backend"), CASES, indirect=["model"])
def test_mixed_batches_answer_as_peft_does(backend: str, model: Path, folders: list[Path]) -> None:
    engine = engine_of(model, backend)
    try:
        assert max(worst(engine, model, folders).values()) < LOGPROB_ROUNDING
        for folder in folders:
            found = submit(engine, [PROMPT], ref(folder)).result(PATIENCE_S).result
            assert_same(found, reference_embedding(model, folder, [PROMPT]))
    finally:
        engine.stop()


def test_dora_beside_tied_lora_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tied=True, text=True, layers=2, hidden_size=64, head_dim=16)
    targets = ["q_proj", "embed_tokens"]
    folder = save_adapter(model, tmp_path / "a", target_modules=targets, ensure_weight_tying=True, use_dora=True)
    refuses(model, folder, "use_dora: not supported beside ensure_weight_tying")


def test_dora_beside_rows_of_the_same_matrix_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tied=False, text=True, layers=2, hidden_size=64, head_dim=16)
    folder = save_resized_adapter(model, tmp_path / "resized-and-lora", use_dora=True)
    refuses(model, folder, "use_dora: not supported on embed_tokens beside trained rows of it")


def test_a_bias_of_the_head_beside_rows_of_it_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT saves the whole head of the model that was trained, which here differs from the base's."""
    model = make_model(tmp_path / "model", tied=False, text=True, layers=2, hidden_size=64, head_dim=16)
    folder = save_adapter(model, tmp_path / "a", r=4, target_modules=["q_proj", "lm_head"], lora_bias=True)
    edit_weights(folder, changed_rows([45, 46], 1))
    refuses(model, folder, "lora_bias: not supported on lm_head beside trained rows of it")


def refuses(model: Path, folder: Path, says: str) -> None:
    engine = engine_of(model, "native")
    try:
        with pytest.raises(InvalidAdapter) as refused:
            engine.load(ref(folder))
        assert says in refused.value.message
    finally:
        engine.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_and_graphs_answer_as_peft_does(dtype: str, model: Path, folders: list[Path]) -> None:
    """Texts come three times, so that the last time their steps are replayed from CUDA graphs."""
    engine = engine_of(model, "csgmv", dtype)
    try:
        for _ in range(3):
            errors = worst(engine, model, folders)
            rounding = 1e-3 if dtype == "float32" else 0.02 + 3 * errors["inner"]
            assert max(errors.values()) < rounding, errors
    finally:
        engine.stop()
