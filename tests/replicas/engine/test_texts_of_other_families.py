"""Texts and vectors of families beyond those of `test_generation_fidelity.py`, through pages, with an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ranklet.kernels.paged_spans import PAGE_TOKENS
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation
from ranklet.replicas.errors import ModelError
from tests.assets.adapters import save_adapter
from tests.assets.make import make_model
from tests.assets.oracle import reference_embedding
from tests.assets.text_oracle import chosen_logprobs, reference_text
from tests.replicas.asking import PATIENCE_S, assert_same, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, AskedText, check, generate, request

MakeEngine = Callable[..., Engine]
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "text": True,
    "pooling": None,
}
WINDOW = 40
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
FOLDERS: dict[str, dict[str, Any]] = {
    "qwen3-windows": {
        "config": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    },
    "qwen2-windows": {
        "architecture": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    },
    "smollm3": {"architecture": "smollm3", "config": {"no_rope_layers": [1, 0, 1]}},
    "gemma3": {
        "architecture": "gemma3_text",
        "config": {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    },
    "phi3": {
        "architecture": "phi3",
        "seed": 1,
        "rope": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + place / 8 for place in range(12)],
            "long_factor": [2.0**place for place in range(12)],
        },
        "config": {"original_max_position_embeddings": 256, "sliding_window": WINDOW},
    },
}
LENGTHS = (5, 63, 130)  # shorter than the window, longer, and over three pages
MAX_TOKENS = 12
GPU_TOKENS = 48
# Nats, on average over a text: up to 0.05 on the CPU. It was 0.4 to 4 behind more tokens than the window if a model was
# served without windows, or with a rotation in each layer.
BFLOAT16_ERROR = 0.1


def make_folders(name: str, folder: Path) -> tuple[Path, Path, list[NDArray[np.int32]]]:
    """Return a model, an adapter on all of its linear layers, and prompts."""
    model = make_model(folder / "model", **SMALL, **FOLDERS[name])
    tuned = save_adapter(model, folder / "tuned", r=6, target_modules="all-linear")
    rng = np.random.default_rng(0)
    return model, tuned, [rng.integers(3, SMALL["vocab_size"], length, dtype=np.int32) for length in LENGTHS]


def logprobs_of(text: Generation) -> NDArray[np.float32]:
    (choice,) = text.choices
    return np.array([each.logprob for each in choice.logprobs or ()], dtype=np.float32)


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_and_vectors_equal_those_of_transformers_and_peft(
    name: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    model, tuned, prompts = make_folders(name, tmp_path)
    engine = make_engine(model, max_model_len=256)
    engine.start()
    adapters: list[tuple[Path | None, AdapterRef | None]] = [(None, None), (tuned, ref(tuned))]
    asked = [
        AskedText(adapter, prompt, text)
        for folder, adapter in adapters
        for prompt, text in zip(prompts, reference_text(model, folder, prompts, MAX_TOKENS), strict=True)
    ]
    cold = [request(engine, each) for each in asked]
    for each, answer in zip(asked, cold, strict=True):
        found = check(each, answer)
        assert found.cached_tokens == 0
        np.testing.assert_allclose(logprobs_of(found), each.expected.logprobs, rtol=0, atol=LOGPROB_ROUNDING)
    warm = [request(engine, each) for each in asked]
    for each, answer in zip(asked, warm, strict=True):
        assert check(each, answer).cached_tokens == (len(each.prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    for folder, adapter in adapters:
        vectors = submit(engine, prompts, adapter).result(PATIENCE_S).result
        assert_same(vectors, reference_embedding(model, folder, prompts))
    engine.check_integrity()


def test_dora_of_fused_modules_equals_that_of_peft(tmp_path: Path, make_engine: MakeEngine) -> None:
    model, _, prompts = make_folders("phi3", tmp_path)
    tuned = save_adapter(model, tmp_path / "dora", r=6, target_modules="all-linear", use_dora=True)
    engine = make_engine(model, max_model_len=256)
    engine.start()
    vectors = submit(engine, prompts, ref(tuned)).result(PATIENCE_S).result
    assert_same(vectors, reference_embedding(model, tuned, prompts))


def test_longrope_beyond_the_original_length_is_refused(tmp_path: Path, make_engine: MakeEngine) -> None:
    model = make_model(tmp_path / "model", **SMALL, **FOLDERS["phi3"])
    assert make_engine(model).limits.max_model_len == 256
    with pytest.raises(ModelError, match=r"max_model_len: expected at most 256.*longrope.*got 300"):
        make_engine(model, max_model_len=300)


def test_gemma_is_refused_on_a_gpu(tmp_path: Path, make_engine: MakeEngine) -> None:
    model = make_model(tmp_path / "model", **SMALL, **FOLDERS["gemma3"])
    with pytest.raises(ModelError, match="Gemma3ForCausalLM is served on the CPU only; expected device cpu, got cuda"):
        make_engine(model, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "gemma3"])
def test_bfloat16_on_a_gpu_keeps_the_logprobs_of_transformers(
    name: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    """All prompts at once, then with cached pages: steps with prompts in pieces, and replayed decodes."""
    model, tuned, prompts = make_folders(name, tmp_path)
    engine = make_engine(model, max_model_len=256, max_batch_requests=16, kv_cache_bytes=16 << 20, dtype="bfloat16")
    engine.start()
    for _ in range(2):
        asked = [(folder, prompt) for folder in (None, tuned) for prompt in prompts]
        answers = [generate(engine, [prompt], ref(folder) if folder else None, GPU_TOKENS) for folder, prompt in asked]
        for (folder, prompt), answer in zip(asked, answers, strict=True):
            text = answer.result(PATIENCE_S).result
            whole = np.concatenate([prompt, text.choices[0].tokens])
            theirs = chosen_logprobs(model, folder, whole)[len(prompt) - 1 :]
            assert np.abs(logprobs_of(text) - theirs).mean() <= BFLOAT16_ERROR
    engine.check_integrity()
