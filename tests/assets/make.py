"""Makes a small but real model folder: transformers writes weights and config, tokenizers trains the tokenizer.

The same arguments give the same bytes. `make_adapters` (adapters.py) is offered here too, since the two go together.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.assets.adapters import AdapterSpec, adapter_specs, make_adapters, quiet
from tests.assets.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LLAMA3_ROPE", "AdapterSpec", "adapter_specs", "make_adapters", "make_model", "randomize"]

Architecture = Literal["qwen3", "qwen2", "llama", "mistral"]
Pooling = Literal["last", "mean", "cls"]

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,  # low, so that short test prompts reach the rescaled frequencies
}
LEGACY_POOLING_KEYS = {
    "last": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
}
PROMPTS = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    "document": "",
}


def make_model(
    folder: Path,
    *,
    architecture: Architecture = "qwen3",
    seed: int = 0,
    hidden_size: int = 128,
    intermediate_size: int = 320,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = 48,
    vocab_size: int = 1024,
    max_position_embeddings: int = 4096,
    tied: bool = True,
    rope: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    legacy_config: bool = False,
    causal_lm: bool = True,
    max_shard_size: int | str = "5GB",
    dtype: str = "float32",
    pooling: Pooling | None = "last",
    normalize: bool = True,
    legacy_pooling: bool = True,
    append_eos: bool = True,
    bos: bool = False,
) -> Path:
    """Write a model folder that transformers, sentence-transformers and ranklet all load. Returns `folder`.

    Args:
        architecture: which decoder of the family.
        head_dim: None takes hidden_size / heads (Qwen2 has no such field and always does).
        rope: rope parameters beside rope_theta, for instance `LLAMA3_ROPE`.
        config: further fields of config.json, as transformers names them.
        legacy_config: write config.json as transformers 4 did, and so as most folders have it.
        causal_lm: keys begin with `model.` (as most folders), or not (as Qwen3-Embedding's).
        max_shard_size: lower it (for instance to "200KB") for several shards with an index.
        pooling: what 1_Pooling/config.json says; None leaves out every file of sentence-transformers.
        legacy_pooling: `pooling_mode_*` flags as all folders up to 2026 have, or the one `pooling_mode` of newer ones.
        append_eos, bos: what the tokenizer's post-processor adds.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, vocab_size=vocab_size, max_length=max_position_embeddings, append_eos=append_eos, bos=bos)
    shape: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **(rope or {})},
        "rms_norm_eps": 1e-6,
        **({} if head_dim is None or architecture == "qwen2" else {"head_dim": head_dim}),
        **(config or {}),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape), dtype=torch.float32)
    randomize(model, seed)
    saved = model if causal_lm else model.get_decoder()
    with quiet():
        saved.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if legacy_config:
        _write_legacy_config(folder / "config.json")
    if pooling is not None:
        _save_pooling(folder, pooling, hidden_size, normalize=normalize, legacy=legacy_pooling)
    return folder


def randomize(model: "nn.Module", seed: int) -> None:
    """Weights under which texts differ: transformers' own start (std 0.02) gives all texts nearly the same vector."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif weight.ndim == 1:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            else:
                gain = 1.0 if "embed_tokens" in name else 1.2 / weight.shape[1] ** 0.5
                weight.copy_(gain * torch.randn(weight.shape, generator=generator))


def _write_legacy_config(path: Path) -> None:
    said = json.loads(path.read_text())
    rope = said.pop("rope_parameters")
    said.pop("layer_types", None)
    said["rope_theta"] = rope.pop("rope_theta")
    said["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    said["torch_dtype"] = said.pop("dtype")
    _write(path, said)


def _save_pooling(folder: Path, pooling: Pooling, hidden_size: int, *, normalize: bool, legacy: bool) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
    )
    if legacy:
        flags = {key: mode == pooling for mode, key in LEGACY_POOLING_KEYS.items()}
        how: dict[str, Any] = {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True}
    else:
        mode = LEGACY_POOLING_KEYS[pooling].removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        how = {"embedding_dimension": hidden_size, "pooling_mode": mode, "include_prompt": True}
    _write(folder / "1_Pooling" / "config.json", how)
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
