"""Adapter folders that must be refused, each with the words that its refusal must contain."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.assets.adapters import save_adapter

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Broken:
    """One kind of bad folder."""

    make: Callable[[Path, Path], Path]  # (model_dir, folder) -> folder
    says: tuple[str, ...]  # every word that the refusal must contain


def sound(model_dir: Path, folder: Path, **lora: Any) -> Path:
    """Write a good adapter, from which the others are made: rank 8 on q_proj and down_proj of every layer."""
    return save_adapter(model_dir, folder, **{"r": 8, "target_modules": ["q_proj", "down_proj"], **lora})


def edit_config(folder: Path, **fields: Any) -> Path:
    """Set fields of adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2))
    return folder


def edit_weights(folder: Path, change: "Callable[[dict[str, torch.Tensor]], object]") -> Path:
    """Change the tensors in place with `change` and save them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _with_config(**fields: Any) -> Callable[[Path, Path], Path]:
    return lambda model_dir, folder: edit_config(sound(model_dir, folder), **fields)


def _with_lora(**lora: Any) -> Callable[[Path, Path], Path]:
    return lambda model_dir, folder: sound(model_dir, folder, **lora)


def _with_weights(change: "Callable[[dict[str, torch.Tensor]], object]") -> Callable[[Path, Path], Path]:
    return lambda model_dir, folder: edit_weights(sound(model_dir, folder), change)


def _key(weights: "dict[str, torch.Tensor]", *parts: str) -> str:
    return next(key for key in sorted(weights) if all(part in key for part in parts))


def _without(name: str) -> Callable[[Path, Path], Path]:
    def make(model_dir: Path, folder: Path) -> Path:
        (sound(model_dir, folder) / name).unlink()
        return folder

    return make


def _with_value(value: float) -> "Callable[[dict[str, torch.Tensor]], object]":
    def change(weights: "dict[str, torch.Tensor]") -> None:
        weights[_key(weights, "layers.2.", "q_proj.lora_B")][1, 1] = value

    return change


def _rename(old: str, new: str) -> "Callable[[dict[str, torch.Tensor]], object]":
    def change(weights: "dict[str, torch.Tensor]") -> None:
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return change


def _drop(*parts: str) -> "Callable[[dict[str, torch.Tensor]], object]":
    return lambda weights: weights.pop(_key(weights, *parts))


def _narrow(weights: "dict[str, torch.Tensor]") -> None:
    key = _key(weights, "layers.1.", "q_proj.lora_A")
    weights[key] = weights[key][:, :-8].contiguous()


def _integers(weights: "dict[str, torch.Tensor]") -> None:
    key = _key(weights, "layers.1.", "q_proj.lora_A")
    weights[key] = weights[key].int()


def _other_base(model_dir: Path, folder: Path) -> Path:
    from tests.assets.make import make_model

    smaller = make_model(folder.parent / f"{folder.name}-base", hidden_size=64)
    return sound(smaller, folder)


def _pickle(model_dir: Path, folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    sound(model_dir, folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def _truncated(model_dir: Path, folder: Path) -> Path:
    path = sound(model_dir, folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def _text(name: str, content: str) -> Callable[[Path, Path], Path]:
    def make(model_dir: Path, folder: Path) -> Path:
        (sound(model_dir, folder) / name).write_text(content)
        return folder

    return make


def _several(model_dir: Path, folder: Path) -> Path:
    sound(model_dir, folder)
    edit_weights(folder, _with_value(float("nan")))
    edit_weights(folder, _drop("layers.3.", "down_proj.lora_B"))
    return edit_config(folder, use_dora=True, bias="some")


BROKEN: dict[str, Broken] = {
    "no-config": Broken(_without(CONFIG), (CONFIG,)),
    "no-weights": Broken(_without(WEIGHTS), (WEIGHTS,)),
    "invalid-json": Broken(_text(CONFIG, '{"r": 8,'), (CONFIG,)),
    "json-list": Broken(_text(CONFIG, "[]"), (CONFIG,)),
    "truncated": Broken(_truncated, (WEIGHTS,)),
    "not-safetensors": Broken(_text(WEIGHTS, "<html>404</html>"), (WEIGHTS,)),
    "pickle": Broken(_pickle, ("adapter_model.bin", "pickle", "safe_serialization")),
    "nan": Broken(_with_weights(_with_value(float("nan"))), ("layers.2.self_attn.q_proj", "lora_B")),
    "infinite": Broken(_with_weights(_with_value(float("inf"))), ("layers.2.self_attn.q_proj", "lora_B")),
    "integers": Broken(_with_weights(_integers), ("layers.1.self_attn.q_proj", "lora_A")),
    "layer-beyond": Broken(_with_weights(_rename("layers.3.", "layers.9.")), ("layers.9.",)),
    "unknown-module": Broken(_with_weights(_rename("mlp.down_proj", "mlp.fc2")), ("mlp.fc2",)),
    "missing-half": Broken(_with_weights(_drop("layers.1.", "down_proj.lora_B")), ("layers.1.mlp.down_proj", "lora_B")),
    "missing-target": Broken(_with_weights(_rename("layers.1.self_attn.q_proj", "layers.1.mlp.up_proj")), ("up_proj",)),
    "wrong-shape": Broken(_with_weights(_narrow), ("layers.1.self_attn.q_proj", "lora_A", "120", "128")),
    "other-size": Broken(_other_base, ("64", "128")),
    "rank-mismatch": Broken(_with_config(r=16), ("16", "8")),
    "other-base": Broken(
        _with_config(base_model_name_or_path="mistralai/Mistral-7B-v0.3"), ("mistralai/Mistral-7B-v0.3",)
    ),
    "dora": Broken(_with_config(use_dora=True), ("use_dora", "lora_magnitude_vector")),
    "bias": Broken(_with_config(bias="some"), ("bias",)),
    "lora-bias": Broken(_with_config(lora_bias=True), ("lora_bias", "lora_B.bias")),
    "modules-to-save": Broken(_with_lora(modules_to_save=["norm"]), ("modules_to_save",)),
    "trainable-tokens": Broken(
        _with_config(trainable_token_indices=[1, 2]), ("trainable_token_indices", "trainable_tokens_delta")
    ),
    # PEFT subtracts the first directions from the base weights when it loads this adapter
    "pissa": Broken(_with_lora(init_lora_weights="pissa"), ("init_lora_weights", "pissa")),
    "fan-in-fan-out": Broken(_with_config(fan_in_fan_out=True), ("fan_in_fan_out",)),
    "activated-lora": Broken(_with_config(alora_invocation_tokens=[5, 6]), ("alora_invocation_tokens",)),
    "layer-replication": Broken(_with_config(layer_replication=[[0, 4], [2, 4]]), ("layer_replication",)),
    "target-parameters": Broken(_with_config(target_parameters=["mlp.experts.gate_up_proj"]), ("target_parameters",)),
    "unknown-field": Broken(_with_config(use_tomorrows_lora=True), ("use_tomorrows_lora",)),
    "peft-type": Broken(_with_config(peft_type="IA3"), ("peft_type", "IA3")),
    "rank-not-a-number": Broken(_with_config(r="eight"), ("r", "eight")),
    "rank-zero": Broken(_with_config(r=0), ("r", "0")),
    "several": Broken(_several, ("use_dora", "bias", "layers.2.self_attn.q_proj", "layers.3.mlp.down_proj")),
}
