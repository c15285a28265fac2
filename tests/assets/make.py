"""Writes a small but complete model folder with transformers and tokenizers. Equal arguments give equal bytes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.assets.adapters import quiet
from tests.assets.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from torch import nn

Architecture = Literal["qwen3", "qwen2", "llama", "mistral", "smollm3", "phi3", "gemma3_text"]
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
_LARGE_IDS = ("smollm3", "phi3")  # their default ids of special tokens are beyond a small vocabulary
_NO_SPECIAL_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
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
    text: bool = False,
) -> Path:
    """Write a model folder that transformers, sentence-transformers and ranklet all load. Returns `folder`.

    Args:
        architecture: the decoder family.
        head_dim: None means hidden_size / heads. Qwen2 and Phi3 have no such field and ignore it.
        rope: rope parameters besides rope_theta, for example `LLAMA3_ROPE`.
        config: further fields of config.json.
        legacy_config: write config.json in the format of transformers 4, which most folders have.
        causal_lm: prefix keys with `model.`, as most folders do and Qwen3-Embedding does not.
        max_shard_size: a low value (for example "200KB") gives several shards and an index.
        pooling: the mode in 1_Pooling/config.json. None writes no sentence-transformers files.
        legacy_pooling: write `pooling_mode_*` flags (folders up to 2026) or one `pooling_mode` (newer ones).
        append_eos, bos: tokens that the tokenizer's post-processor adds.
        text: give the weights sizes with which greedy text varies; see `randomize`.
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
        **({} if head_dim is None or architecture in ("qwen2", "phi3") else {"head_dim": head_dim}),
        **(_NO_SPECIAL_IDS if architecture in _LARGE_IDS else {}),
        **(config or {}),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape), dtype=torch.float32)
    randomize(model, seed, text=text)
    saved = model if causal_lm else model.get_decoder()
    with quiet():
        saved.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if legacy_config:
        _write_legacy_config(folder / "config.json")
    if pooling is not None:
        _save_pooling(folder, pooling, hidden_size, normalize=normalize, legacy=legacy_pooling)
    return folder


def randomize(model: "nn.Module", seed: int, *, text: bool = False) -> None:
    """Overwrite the weights. With transformers' initial ones (std 0.02) every text gets nearly the same vector.

    Args:
        text: with the other weights a tied head repeats the last token, because the state resembles its embedding. For
            text the last norm's weights have random signs, which hides the resemblance, and the logits have a standard
            deviation of about 3, so that the best token is rarely close to the second.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if text and name == "model.norm.weight":
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif weight.ndim == 1:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            else:
                weight.copy_(_gain(name, weight.shape[1], text=text) * torch.randn(weight.shape, generator=generator))


def _gain(name: str, width: int, *, text: bool) -> float:
    if text and name in ("model.embed_tokens.weight", "lm_head.weight"):
        return float(3.0 / width**0.5)
    return 1.0 if "embed_tokens" in name else float(1.2 / width**0.5)


def _write_legacy_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    _write(path, config)


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
        content: dict[str, Any] = {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True}
    else:
        mode = LEGACY_POOLING_KEYS[pooling].removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        content = {"embedding_dimension": hidden_size, "pooling_mode": mode, "include_prompt": True}
    _write(folder / "1_Pooling" / "config.json", content)
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
