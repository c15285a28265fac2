"""Model folders and adapters with real shapes and random weights."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ranklet.replicas.model.architecture import Architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FILE_BYTES = 4 << 30


def decoder(
    name: str, *, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int
) -> Architecture:
    """Return an architecture with these dimensions and Qwen3-Embedding's other settings."""
    return Architecture(
        name, layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, eps=1e-6,
        qk_norm=name.startswith("Qwen3"), windows=(None,) * layers, max_position=32_768,
    )  # fmt: skip


QWEN3_EMBEDDING_06B = decoder(
    "Qwen3Model", layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=151_669
)
QWEN3_06B = dataclasses.replace(QWEN3_EMBEDDING_06B, name="Qwen3ForCausalLM")
LLAMA_31_8B = decoder(
    "LlamaForCausalLM", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14_336, vocab=128_256
)


def module_path(layer: int, name: str) -> str:
    group = "self_attn" if name in ATTENTION else "mlp"
    return f"layers.{layer}.{group}.{name}"


def write_model(
    folder: Path, shape: Architecture = QWEN3_EMBEDDING_06B, *, layers: int | None = None, seed: int = 0
) -> Path:
    """Write a Qwen3 or Llama folder of this shape with random bf16 weights (std 1/sqrt(width)) and norms near one.

    A causal Llama has a head of its own; other models tie it to the embedding. Large models are written in several
    files, so that host memory holds one at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = layers or shape.layers
    (folder / "config.json").write_text(json.dumps(_config(shape, layers)))
    draws = _Draws(seed)
    ends = {"embed_tokens.weight": draws.normal(shape.vocab, shape.hidden, std=0.02)}
    ends["norm.weight"] = draws.near_one(shape.hidden)
    if not _is_tied(shape):
        ends["lm_head.weight"] = draws.normal(shape.vocab, shape.hidden, std=1 / math.sqrt(shape.hidden))
    weights = layers * sum(wide * out for wide, out in shape.module_dims().values())
    at_once = layers if 2 * weights < _FILE_BYTES else max(1, _FILE_BYTES * layers // (2 * weights))
    groups = [range(start, min(start + at_once, layers)) for start in range(0, layers, at_once)]
    files: dict[str, str] = {}
    for number, group in enumerate(groups):
        tensors = {} if number else ends
        for layer in group:
            tensors |= _layer(shape, layer, draws)
        if _is_causal(shape):
            tensors = {key if key.startswith("lm_head.") else f"model.{key}": value for key, value in tensors.items()}
        name = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _is_causal(shape: Architecture) -> bool:
    return shape.name.endswith("ForCausalLM")


def _is_tied(shape: Architecture) -> bool:
    return not (_is_causal(shape) and shape.name.startswith("Llama"))


def _config(shape: Architecture, layers: int) -> dict[str, Any]:
    family: dict[str, Any] = {"model_type": "qwen3", "rope_theta": 1_000_000}
    if shape.name.startswith("Llama"):
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}  # fmt: skip
        family = {"model_type": "llama", "rope_theta": 500_000, "rope_scaling": scaling, "mlp_bias": False}
    return {
        "architectures": [shape.name], "hidden_size": shape.hidden,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": shape.max_position,
        "tie_word_embeddings": _is_tied(shape), "attention_bias": False, "dtype": "bfloat16", **family,
    }  # fmt: skip


class _Draws:
    """Random bf16 tensors, drawn on the GPU if there is one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)

    def normal(self, *size: int, std: float) -> torch.Tensor:
        draw = torch.randn(size, generator=self._generator, device=self._generator.device) * std
        return draw.bfloat16().cpu()

    def near_one(self, width: int) -> torch.Tensor:
        return (1 + self.normal(width, std=0.1).float()).bfloat16()


def _layer(shape: Architecture, layer: int, draws: _Draws) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (wide, out) in shape.module_dims().items():
        tensors[f"{module_path(layer, name)}.weight"] = draws.normal(out, wide, std=1 / math.sqrt(wide))
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"layers.{layer}.{name}.weight"] = draws.near_one(shape.hidden)
    for name in ("q_norm", "k_norm") if shape.qk_norm else ():
        tensors[f"layers.{layer}.self_attn.{name}.weight"] = draws.near_one(shape.head_dim)
    return tensors


def write_adapters(
    folder: Path, count: int, *, shape: Architecture = QWEN3_EMBEDDING_06B, layers: int | None = None, rank: int = 64,
    modules: tuple[str, ...] = ATTENTION, dora: bool = False,
) -> list[Path]:  # fmt: skip
    """Write PEFT folders `folder/ad000` ... whose LoRA output is about a tenth of the base's, as plain LoRA or DoRA."""
    made = []
    for i in range(count):
        path = folder / f"ad{i:03d}"
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(modules),
            "bias": "none",
            "use_dora": dora,
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        tensors = _lora_tensors(shape, layers or shape.layers, rank, modules, i)
        if dora:
            tensors |= _magnitudes(tensors)
        save_file(tensors, path / "adapter_model.safetensors")
        made.append(path)
    return made


def _magnitudes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Draw magnitudes of DoRA near 1, the norm of the rows of `write_model`'s weights."""
    draws = _Draws(0)
    return {
        key.replace("lora_B.weight", "lora_magnitude_vector"): draws.near_one(len(b))
        for key, b in tensors.items()
        if key.endswith("lora_B.weight")
    }


def _lora_tensors(
    shape: Architecture, layers: int, rank: int, modules: tuple[str, ...], seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(1000 + seed)
    tensors = {}
    for layer in range(layers):
        for name in modules:
            wide, out = shape.module_dims()[name]
            key = f"base_model.model.{'model.' * _is_causal(shape)}{module_path(layer, name)}"
            for side, size, std in (
                ("A", (rank, wide), 1 / math.sqrt(wide)),
                ("B", (out, rank), 0.05 / math.sqrt(rank)),
            ):
                draw = torch.randn(size, generator=generator, device=generator.device) * std
                tensors[f"{key}.lora_{side}.weight"] = draw.bfloat16().cpu()
    return tensors
