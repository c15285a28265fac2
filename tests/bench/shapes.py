"""Model folders and adapters with real shapes and random weights."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ranklet.replicas.model.architecture import Architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


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
LLAMA_31_8B = decoder(
    "LlamaModel", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14_336, vocab=128_256
)


def module_path(layer: int, name: str) -> str:
    group = "self_attn" if name in ATTENTION else "mlp"
    return f"layers.{layer}.{group}.{name}"


def write_model(
    folder: Path, shape: Architecture = QWEN3_EMBEDDING_06B, *, layers: int | None = None, seed: int = 0
) -> Path:
    """Write a Qwen3 folder of this shape with random bf16 weights (std 1/sqrt(width)) and norms near one."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = layers or shape.layers
    config: dict[str, Any] = {
        "architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_size": shape.hidden,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "attention_bias": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)

    def normal(*size: int, std: float) -> torch.Tensor:
        draw = torch.randn(size, generator=generator, device=generator.device) * std
        return draw.bfloat16().cpu()

    def near_one(width: int) -> torch.Tensor:
        return (1 + normal(width, std=0.1).float()).bfloat16()

    tensors = {
        "embed_tokens.weight": normal(shape.vocab, shape.hidden, std=0.02),
        "norm.weight": near_one(shape.hidden),
    }
    for layer in range(layers):
        for name, (wide, out) in shape.module_dims().items():
            tensors[f"{module_path(layer, name)}.weight"] = normal(out, wide, std=1 / math.sqrt(wide))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"layers.{layer}.{name}.weight"] = near_one(shape.hidden)
        for name in ("q_norm", "k_norm"):
            tensors[f"layers.{layer}.self_attn.{name}.weight"] = near_one(shape.head_dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapters(
    folder: Path, count: int, *, shape: Architecture = QWEN3_EMBEDDING_06B, layers: int | None = None, rank: int = 64,
    modules: tuple[str, ...] = ATTENTION,
) -> list[Path]:  # fmt: skip
    """Write PEFT folders `folder/ad000` ... whose LoRA output is about a tenth of the base's."""
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
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(_lora_tensors(shape, layers or shape.layers, rank, modules, i), path / "adapter_model.safetensors")
        made.append(path)
    return made


def _lora_tensors(
    shape: Architecture, layers: int, rank: int, modules: tuple[str, ...], seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(1000 + seed)
    tensors = {}
    for layer in range(layers):
        for name in modules:
            wide, out = shape.module_dims()[name]
            key = f"base_model.model.{module_path(layer, name)}"
            for side, size, std in (
                ("A", (rank, wide), 1 / math.sqrt(wide)),
                ("B", (out, rank), 0.05 / math.sqrt(rank)),
            ):
                draw = torch.randn(size, generator=generator, device=generator.device) * std
                tensors[f"{key}.lora_{side}.weight"] = draw.bfloat16().cpu()
    return tensors
