"""Divides LoRA of Megatron's modules among the modules of its base.

NeMo 2 and Megatron-Bridge name a matrix `decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight`; where
PEFT wraps a Megatron model, as in ms-swift, it is `...linear_qkv.lora_A.weight`. Rows of linear_qkv are ordered by key
head: its query heads, its key, its value. Those of linear_fc1 are gate, then up. Both modules have one A for all their
parts; "canonical" LoRA has an adapter for each, `...linear_qkv.adapter.adapter_q.linear_in.weight`. The factor of B A
is alpha / r, and DoRA's magnitudes are the norms of rows, as in PEFT.

Sources: NeMo's `HFLlamaPEFTExporter` and `TransformFns`; Megatron-Bridge's `models/conversion/peft_bridge.py`,
`peft/dora_layers.py` and `split_qkv_weights`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ranklet.replicas.adapters.findings import shorten, show
from ranklet.replicas.conversion.stored_weights import MERGES_MEGATRON, ConversionError
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import FUSED_MODULES, module_path

_ANY = re.compile(r"\.linear_(?:qkv|proj|fc1|fc2)\.")
_KEY = re.compile(
    r"(?:(?:base_model|model|module|language_model)\.)*decoder\.layers\.(?P<layer>\d{1,4})\."
    r"(?P<module>self_attention\.linear_(?:qkv|proj)|mlp\.linear_(?:fc1|fc2))\."
    r"(?:adapter\.(?:adapter_(?P<part>q|k|v|gate|up)\.)?)?(?P<kind>[a-zA-Z_]+?)(?:\.weight)?"
)
_NAMES = {
    "self_attention.linear_qkv": "qkv_proj", "self_attention.linear_proj": "o_proj", "mlp.linear_fc1": "gate_up_proj",
    "mlp.linear_fc2": "down_proj",
}  # fmt: skip
_A, _B, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_KINDS = {
    "linear_in": _A, "linear_out": _B, "weight_magnitude": _MAGNITUDE, "lora_a": _A, "lora_b": _B, _A: _A, _B: _B,
    _MAGNITUDE: _MAGNITUDE,
}  # fmt: skip
_OF_MODULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config")


def is_megatron(names: Iterable[str]) -> bool:
    return any(_ANY.search(name) for name in names)


def of_megatron(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Architecture
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors by PEFT's names.

    Raises:
        ConversionError: a tensor is none of a linear layer's LoRA, has not the size that it has in this base, or comes
            twice.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name):
            raise ConversionError(f"{name}: expected none for Megatron's modules, got {show(fields[name])}")
    made: dict[str, Tensor] = {}
    targets: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        for layer, module, kind, own in _parts(name, tensor, shape):
            key = f"base_model.model.model.layers.{layer}.{module_path(module)}.{kind}"
            key = key if kind == _MAGNITUDE else f"{key}.weight"
            if key in made:
                raise ConversionError(
                    f"{shorten(name)}: a second tensor for {kind} of {module} in layer {layer}; expected one"
                )
            made[key] = own
            targets.setdefault(module, set()).add(layer)
    kept = {name: value for name, value in fields.items() if name not in _OF_MODULES}
    return {**kept, "target_modules": list(_targets(targets, shape))}, made


def _targets(found: Mapping[str, set[int]], shape: Architecture) -> Iterator[str]:
    """Yield the modules' names. Those that not all layers have are named with their layer."""
    for module, layers in found.items():
        if len(layers) == shape.layers:
            yield module
        else:
            yield from (f"model.layers.{layer}.{module_path(module)}" for layer in sorted(layers))


def _parts(name: str, tensor: Tensor, shape: Architecture) -> Iterator[tuple[int, str, str, Tensor]]:
    """Yield the layer, module, kind and values of what the base's modules get of a tensor."""
    key = _KEY.fullmatch(name)
    kind = None if key is None else _KINDS.get(key["kind"])
    if key is None or kind is None or int(key["layer"]) >= shape.layers:
        raise ConversionError(
            f"{shorten(name)}: expected LoRA of linear_qkv, linear_proj, linear_fc1 or linear_fc2 in {shape.layers} "
            f"dense layers; {MERGES_MEGATRON}"
        )
    fused, part = _NAMES[key["module"]], key["part"]
    modules = (fused,) if shape.fused else FUSED_MODULES.get(fused, (fused,))
    if part is not None and f"{part}_proj" not in modules:
        raise ConversionError(f"{shorten(name)}: expected an adapter of {' or '.join(modules)}, which the base has")
    if part is not None:
        modules = (f"{part}_proj",)
    widths = [shape.dims(module)[1] for module in modules]
    expected = shape.dims(modules[0])[0] if kind == _A else sum(widths)
    got = tensor.shape[-1 if kind == _A else 0] if tensor.ndim == (1 if kind == _MAGNITUDE else 2) else None
    if got != expected:
        raise ConversionError(
            f"{shorten(name)}: expected {expected} {'columns' if kind == _A else 'rows'} for this base, got "
            f"{list(tensor.shape)}; if it is one part of several, {MERGES_MEGATRON}"
        )
    layer = int(key["layer"])
    if kind == _A:
        yield from ((layer, module, kind, tensor.clone()) for module in modules)
        return
    ordered = _by_module(tensor, shape) if fused == "qkv_proj" and part is None else tensor
    parts = ordered.split(widths)
    yield from ((layer, module, kind, own.clone()) for module, own in zip(modules, parts, strict=True))


def _by_module(qkv: Tensor, shape: Architecture) -> Tensor:
    """Reorder rows by key head to those of all queries, then all keys, then all values."""
    queries = shape.heads // shape.kv_heads
    grouped = qkv.reshape(shape.kv_heads, queries + 2, shape.head_dim, *qkv.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in grouped.split((queries, 1, 1), 1)])
