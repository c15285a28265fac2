"""LoRA of the token embedding and of the head, which not every adapter of a batch has, on each backend."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranklet.kernels.dispatch import NAMES
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.model.modules import ALL_MODULES
from tests.assets.adapters import save_adapter
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.assets.text_oracle import reference_logprobs
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, generate

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
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    return make_model(folder, architecture="llama", tied=False, text=True, layers=2, hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def folders(model: Path) -> list[Path]:
    return [save_adapter(model, model.parent / name, **fields) for name, fields in ADAPTERS.items()]


@pytest.mark.parametrize("backend", NAMES)
def test_mixed_batches_answer_as_peft_does(backend: str, model: Path, folders: list[Path]) -> None:
    config = EngineConfig(
        model, slots=4, max_batch_tokens=1024, kv_cache_bytes=8 << 20, lora_modules=ALL_MODULES, backend=backend
    )
    engine = Engine(config)
    engine.start()
    try:
        with engine.paused():
            texts = [generate(engine, [PROMPT], ref(folder), 3, prompt_logprobs=0) for folder in folders]
            vectors = [submit(engine, [PROMPT], ref(folder)) for folder in folders]
        for folder, text, vector in zip(folders, texts, vectors, strict=True):
            made = text.result(PATIENCE_S).result
            (choice,) = made.choices
            tokens = np.concatenate([PROMPT, choice.tokens])
            wanted = reference_logprobs(model, folder, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
            ours = [each.logprob for each in (*made.prompt_logprobs[0], *choice.logprobs)]
            assert np.abs(ours - wanted).max() < LOGPROB_ROUNDING, folder.name
            assert_same(vector.result(PATIENCE_S).result, reference_embedding(model, folder, [PROMPT]))
    finally:
        engine.stop()
