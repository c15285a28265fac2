"""Vectors of each model family equal those of transformers and PEFT; broken checkpoints are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.errors import ModelError
from tests.assets.adapters import save_adapter
from tests.assets.corpus import TEXTS
from tests.assets.make import LLAMA3_ROPE, make_model
from tests.assets.oracle import reference_embedding
from tests.replicas.asking import ask, assert_same, prompts, ref

MakeEngine = Callable[..., Engine]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 24,
}
LONG = " ".join(TEXTS[:12])  # longer than every window below
GEMMA: dict[str, Any] = {
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 40,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    },
}

FOLDERS: dict[str, dict[str, Any]] = {
    "qwen2-with-biases": {"architecture": "qwen2"},
    "qwen2-sliding-from-layer-1": {
        "architecture": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    },
    "llama-llama3-rope": {"architecture": "llama", "rope": LLAMA3_ROPE, "bos": True},
    "llama-biases-everywhere": {"architecture": "llama", "config": {"attention_bias": True, "mlp_bias": True}},
    "llama-yarn": {
        "architecture": "llama",
        "rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    },
    "llama-linear-rope": {"architecture": "llama", "rope": {"rope_type": "linear", "factor": 4.0}},
    "mistral-window": {"architecture": "mistral", "config": {"sliding_window": 11}},
    "mistral-no-window": {"architecture": "mistral", "config": {"sliding_window": None}},
    "qwen3-alternating-windows": {
        "config": {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    },
    "smollm3-no-rotary-in-layer-1": {"architecture": "smollm3", "config": {"no_rope_layers": [1, 0, 1]}},
    "smollm3-windows-where-no-rotary": {
        "architecture": "smollm3",
        "rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        "config": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    },
    "phi3-partial-longrope": {
        "architecture": "phi3",
        "rope": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
        "config": {"original_max_position_embeddings": 1024},
    },
    "phi3-window": {"architecture": "phi3", "tied": False, "config": {"sliding_window": 11}},
    "gemma3": {"architecture": "gemma3_text", "config": GEMMA},
    "qwen3-untied-sharded": {"tied": False, "max_shard_size": "60KB"},
    "qwen3-bare-legacy": {"causal_lm": False, "legacy_config": True},
    "llama-legacy-rope-scaling": {"architecture": "llama", "rope": LLAMA3_ROPE, "legacy_config": True},
    "qwen3-no-sentence-transformers-files": {"pooling": None},
    "qwen3-one-key-head": {"kv_heads": 1},
    "qwen3-as-many-key-heads": {"kv_heads": 4},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_vectors_equal_those_of_transformers_and_peft(name: str, tmp_path: Path, make_engine: MakeEngine) -> None:
    folder = make_model(tmp_path / "model", **{**SMALL, **FOLDERS[name]})
    adapter = save_adapter(folder, tmp_path / "tuned", r=6, target_modules="all-linear")
    dora = save_adapter(folder, tmp_path / "dora", r=4, target_modules="all-linear", use_dora=True, bias="all")
    engine = make_engine(folder)
    engine.start()
    texts = [LONG, TEXTS[20], "x"]
    assert len(prompts(folder, [LONG])[0]) > 200
    assert_same(ask(engine, prompts(folder, texts)).result, reference_embedding(folder, None, texts))
    for each in (adapter, dora):
        answer = ask(engine, prompts(folder, texts), ref(each))
        assert_same(answer.result, reference_embedding(folder, each, texts))


def test_lora_of_a_scaled_embedding_equals_that_of_peft(tmp_path: Path, make_engine: MakeEngine) -> None:
    folder = make_model(tmp_path / "model", **SMALL, architecture="gemma3_text", config=GEMMA)
    adapter = save_adapter(folder, tmp_path / "tuned", r=6, target_modules=["embed_tokens", "q_proj"])
    engine = make_engine(folder)
    engine.start()
    answer = ask(engine, prompts(folder, TEXTS[:3]), ref(adapter))
    assert_same(answer.result, reference_embedding(folder, adapter, TEXTS[:3]))


def test_a_bfloat16_folder_is_served_in_float32(tmp_path: Path, make_engine: MakeEngine) -> None:
    folder = make_model(tmp_path / "model", **SMALL, dtype="bfloat16")
    engine = make_engine(folder)
    engine.start()
    assert_same(ask(engine, prompts(folder, TEXTS[:3])).result, reference_embedding(folder, None, TEXTS[:3]))


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _with_another_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.gate.weight"] = torch.zeros(2, 2)


def _with_another_layer(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.2." in key]:
        tensors[key.replace("layers.2.", "layers.3.")] = tensors[key].clone()


def _narrowed(tensors: dict[str, torch.Tensor]) -> None:
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = tensors[key][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "layers.1.mlp.up_proj.weight"),
        (_with_another_tensor, "layers.1.self_attn.gate.weight"),
        (_with_another_layer, "layers.3."),
        (_narrowed, "layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_checkpoint_with_wrong_tensors_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    folder = make_model(tmp_path / "model", **SMALL)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as refused:
        make_engine(folder)
    assert message in refused.value.message
