"""Reference embeddings from transformers and PEFT in float32, one unpadded text at a time."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.assets.adapters import load_base, quiet

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | np.ndarray


# PEFT saves these a second time if the vocabulary was resized, and does not load them.
_TWICE = ("lm_head.token_adapter.trainable", ".modules_to_save.", ".original_module.")


def reference_embedding(
    model_dir: Path,
    adapter_dir: Path | None,
    prompts: Sequence[Prompt],
    *,
    dimensions: int | None = None,
    pooling: str | None = None,
) -> np.ndarray:
    """Compute embeddings with transformers and PEFT: float32 [prompts, dimensions or hidden].

    Args:
        prompts: texts, to which the tokenizer adds its special tokens, or token ids, which are used unchanged.
        dimensions: truncate to this many dimensions and normalise again.
        pooling: last, mean or cls; None for that of the model's folder.

    Raises:
        ValueError: PEFT ignored keys of the adapter or left weights of it unset.
    """
    import torch

    model_dir = Path(model_dir)
    decoder = _decoder(model_dir, adapter_dir and Path(adapter_dir), stamp(model_dir), stamp(adapter_dir))
    mode, normalize = pooling_of(model_dir)
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = encode(model_dir, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
            states = decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]  # [tokens, hidden]
            vector = _pool(states, pooling or mode)[: dimensions or states.shape[-1]]
            rows.append(torch.nn.functional.normalize(vector, dim=0) if normalize or dimensions else vector)
    return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def encode(model_dir: Path, text: str) -> list[int]:
    """Tokenise one text with the model folder's tokenizer, special tokens included."""
    ids: list[int] = _tokenizer(Path(model_dir))(text)["input_ids"]
    return ids


def pooling_of(model_dir: Path) -> tuple[str, bool]:
    """Read (last | mean | cls, normalise?) from sentence-transformers' files. Returns (last, True) without them."""
    modules = model_dir / "modules.json"
    if not modules.exists():
        return "last", True
    kinds = [module["type"].rsplit(".", 1)[-1] for module in json.loads(modules.read_text())]
    config = json.loads((model_dir / "1_Pooling" / "config.json").read_text())
    if "pooling_mode" in config:
        mode = {"lasttoken": "last", "mean": "mean", "cls": "cls"}[config["pooling_mode"]]
    else:
        flags = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        mode = next(flags[key] for key in flags if config.get(key))
    return mode, "Normalize" in kinds


def _pool(states: "torch.Tensor", mode: str) -> "torch.Tensor":
    return {"last": states[-1], "cls": states[0], "mean": states.mean(dim=0)}[mode]


@lru_cache(maxsize=4)
def _tokenizer(model_dir: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir))


@lru_cache(maxsize=12)
def _decoder(model_dir: Path, adapter_dir: Path | None, *stamps: int) -> "nn.Module":
    if adapter_dir is None:
        with quiet():
            return load_base(model_dir, "bare").eval()
    causal = is_causal(adapter_dir)
    with quiet():
        model = load_base(model_dir, "causal" if causal else "bare")
        resize(model, adapter_dir)
        attach(model, adapter_dir)
    decoder: nn.Module = model.get_submodule("model") if causal else model
    return decoder.eval()


def is_causal(adapter_dir: Path) -> bool:
    """Return whether the adapter's keys are those of a model with an LM head."""
    from safetensors import safe_open

    with safe_open(str(adapter_dir / "adapter_model.safetensors"), framework="pt") as file:
        return any(key.startswith("base_model.model.model.") for key in file.keys())  # noqa: SIM118 - no mapping


def resize(model: "nn.Module", adapter_dir: Path) -> None:
    """Give a model as many tokens as the adapter's own embedding has, if the file has a larger one."""
    from safetensors import safe_open

    resizable: Any = model
    with safe_open(str(adapter_dir / "adapter_model.safetensors"), framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if key.endswith(".weight")]  # noqa: SIM118
    size = max((shape[0] for shape in shapes if shape[1:] == [resizable.config.hidden_size]), default=0)
    if size > resizable.config.vocab_size:
        resizable.resize_token_embeddings(size, mean_resizing=False)


def attach(model: "nn.Module", adapter_dir: Path) -> Any:
    """Add the adapter's layers to `model` in place. Raises ValueError where PEFT only warns.

    Returns:
        PEFT's model, which activates aLoRA adapters.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter_dir))
    config.inference_mode = True
    wrapped: PeftModel = get_peft_model(model, config)
    result: Any = set_peft_model_state_dict(wrapped, load_file(adapter_dir / "adapter_model.safetensors"))
    unfilled = [key for key in result.missing_keys if "lora_" in key]
    unused = [key for key in result.unexpected_keys if not any(part in key for part in _TWICE)]
    if unused or unfilled:
        raise ValueError(f"{adapter_dir}: PEFT left unused {unused} and unfilled {unfilled}")
    return wrapped


def stamp(folder: Path | None) -> int:
    """Return the time of the newest weights, which keeps the cache from serving old ones."""
    files = Path(folder).glob("*.safetensors") if folder else ()
    return max((file.stat().st_mtime_ns for file in files), default=0)
