"""DoRA and trained biases answer as PEFT computes them, in the same batches as plain LoRA."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.request import Answer
from ranklet.replicas.errors import InvalidAdapter
from tests.assets.adapters import LINEAR, save_adapter
from tests.assets.broken import edit_config, edit_weights
from tests.assets.corpus import TEXTS
from tests.assets.make import make_model
from tests.assets.oracle import cosine, reference_embedding
from tests.assets.text_oracle import reference_logprobs
from tests.replicas.asking import PATIENCE_S, ask, assert_same, prompts, ref, submit
from tests.replicas.text_scene import LOGPROB_ROUNDING, generate

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": list(LINEAR)},
    "dora": {"target_modules": list(LINEAR), "use_dora": True},
    "dora-ranks": {
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "use_dora": True, "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"o_proj": 11},
    },
    "bias-all": {"target_modules": ["v_proj", "up_proj"], "bias": "all"},
    "bias-of-targets": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["k_proj", "gate_proj", "down_proj"], "lora_bias": True},
    "dora-and-bias": {"target_modules": ["k_proj", "gate_proj"], "use_dora": True, "bias": "all"},
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "architecture": "llama", "text": True, "config": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("terms") / "model", **FIELDS)
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    weights = load_file(path)
    for key in sorted(weights):
        if key.endswith(".bias"):
            weights[key] = 0.3 * torch.randn(weights[key].shape, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    return {name: save_adapter(model, model.parent / name, **{"r": 6, **ADAPTERS[name]}) for name in ADAPTERS}


def owners(folders: dict[str, Path]) -> list[Path | None]:
    return [None, *folders.values()]


def engine_of(model: Path, **fields: Any) -> Engine:
    config = EngineConfig(model, **{"slots": 8, "max_batch_tokens": 4096, "kv_cache_bytes": 8 << 20, **fields})
    engine = Engine(config)
    engine.start()
    return engine


@pytest.fixture(scope="module", params=["native", "merged"])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    running = engine_of(model, backend=request.param)
    yield running
    running.stop()


def test_vectors_of_mixed_batches_equal_those_of_peft(engine: Engine, model: Path, folders: dict[str, Path]) -> None:
    texts = TEXTS[:2]
    asked = prompts(model, texts)
    for folder in folders.values():
        engine.load(ref(folder))
    with engine.paused():
        found = {each: submit(engine, asked, ref(each) if each else None) for each in owners(folders)}
    seen: set[bytes] = set()
    for each, answer in found.items():
        vectors = answer.result(PATIENCE_S).result
        assert_same(vectors, reference_embedding(model, each, texts))
        seen.add(vectors.tobytes())
    assert len(seen) == len(found), "two adapters gave the same vectors"


def test_logprobs_of_mixed_texts_equal_those_of_peft(engine: Engine, model: Path, folders: dict[str, Path]) -> None:
    asked: NDArray[np.int32] = np.arange(40, 52, dtype=np.int32)
    with engine.paused():
        found = {each: generate(engine, [asked], ref(each) if each else None, 6) for each in owners(folders)}
    for folder, answer in found.items():
        assert _error(model, folder, asked, answer) <= LOGPROB_ROUNDING


def test_a_plain_adapter_in_the_slot_of_another_has_no_terms(model: Path, folders: dict[str, Path]) -> None:
    engine = engine_of(model, slots=1)
    asked = prompts(model, TEXTS[:1])
    for name in ("dora-and-bias", "plain", "bias-all", "plain"):
        found = ask(engine, asked, ref(folders[name])).result
        assert_same(found, reference_embedding(model, folders[name], TEXTS[:1]))
    engine.stop()


def _without(part: str) -> Any:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[next(key for key in sorted(weights) if part in key)]

    return change


def _with(part: str, tensor: torch.Tensor) -> Any:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[next(key for key in sorted(weights) if part in key)] = tensor

    return change


OVERFLOWS = "1 modules give outputs beyond 1e+15, which overflow in float32: layer 0 o_proj"
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "missing": ("dora", _without("magnitude"), {}, "use_dora: expected lora_magnitude_vector of each module, 1 have"),
    "missing-bias": ("bias-all", _without("k_proj.bias"), {}, "bias: expected bias of each module, 1 have none"),
    "shape": ("dora", _with("o_proj.lora_mag", torch.ones(65)), {}, "expected shape [64], got [65]"),
    "dtype": ("dora", _with("lora_mag", torch.ones(64).int()), {}, "got I32"),
    "nan": ("bias-all", _with("k_proj.bias", torch.full((32,), float("nan"))), {}, "k_proj: bias: expected finite"),
    "infinite": (
        "lora-bias",
        _with("k_proj.lora_B.b", torch.full((32,), float("inf"))),
        {},
        "lora_B.bias: expected finite",
    ),
    "large-magnitude": ("dora", _with("0.self_attn.o_proj.lora_mag", torch.full((64,), 1e16)), {}, OVERFLOWS),
    "large-bias": ("bias-all", _with("0.self_attn.o_proj.bias", torch.full((64,), -1e16)), {}, OVERFLOWS),
    "scaled-bias": (
        "lora-bias",
        _with("0.mlp.down_proj.lora_B.b", torch.full((64,), 1e10)),
        {"lora_alpha": 6e8},
        "1 modules give outputs beyond 1e+15, which overflow in float32: layer 0 down_proj",
    ),
    "unnamed": ("dora", lambda weights: None, {"use_dora": False}, "14 modules have lora_magnitude_vector, which it"),
    "unnamed-bias": ("bias-all", lambda weights: None, {"bias": "none"}, "14 modules have bias, which it leaves out"),
    "only-targets": ("bias-all", lambda weights: None, {"bias": "lora_only"}, "bias: 10 modules have bias, which it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_vectors_that_do_not_fit_are_refused_by_name(name: str, engine: Engine, model: Path, tmp_path: Path) -> None:
    kind, change, fields, says = REFUSED[name]
    folder = save_adapter(model, tmp_path / name, **{"r": 6, **ADAPTERS[kind]})
    edit_config(edit_weights(folder, change), **fields)
    with pytest.raises(InvalidAdapter) as refused:
        engine.load(ref(folder))
    assert says in refused.value.message


def test_terms_of_a_base_without_biases(tmp_path: Path) -> None:
    """PEFT only warns of `lora_bias` there. `bias` trains nothing."""
    model = make_model(tmp_path / "model", **{**FIELDS, "architecture": "qwen3", "config": {}})
    engine = engine_of(model)
    for name in ("lora-bias", "bias-all", "dora-and-bias"):
        folder = save_adapter(model, tmp_path / name, r=4, **ADAPTERS[name])
        found = ask(engine, prompts(model, TEXTS[:1]), ref(folder)).result
        assert_same(found, reference_embedding(model, folder, TEXTS[:1]))
    engine.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_and_graphs_answer_as_peft_does(dtype: str, model: Path, folders: dict[str, Path]) -> None:
    """Texts come three times, so that the last time their steps are replayed from CUDA graphs."""
    engine = engine_of(model, backend="csgmv", dtype=dtype)
    asked: NDArray[np.int32] = np.arange(40, 52, dtype=np.int32)
    try:
        for _ in range(3):
            with engine.paused():
                found = {each: generate(engine, [asked], ref(each) if each else None, 6) for each in owners(folders)}
            errors = {each: _error(model, each, asked, answer) for each, answer in found.items()}
            rounding = 1e-3 if dtype == "float32" else 0.02 + 3 * max(errors[None], errors[folders["plain"]])
            assert max(errors.values()) < rounding, errors
        for folder in folders.values():
            (vector,), (wanted,) = ask(engine, [asked], ref(folder)).result, reference_embedding(model, folder, [asked])
            assert cosine(vector, wanted) > (0.99999 if dtype == "float32" else 0.99)
    finally:
        engine.stop()


def _error(model: Path, folder: Path | None, asked: NDArray[np.int32], answer: Future[Answer]) -> float:
    """Return the largest error of a token's logprob."""
    (choice,) = answer.result(PATIENCE_S).result.choices
    table = reference_logprobs(model, folder, np.concatenate([asked, choice.tokens]))[len(asked) - 1 : -1]
    ours = np.array([each.logprob for each in choice.logprobs])
    return float(np.abs(ours - table[np.arange(len(ours)), choice.tokens]).max())
