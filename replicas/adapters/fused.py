"""Divides what adapters have of fused modules, qkv_proj and gate_up_proj, among the modules that these consist of."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ranklet.replicas.adapters.adapter import AdapterWeights, LoraWeight
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import FUSED_MODULES, Module


def parts_of(names: Iterable[str]) -> set[str]:
    """Return the modules that the named ones consist of."""
    return {part for name in names for part in FUSED_MODULES.get(name, (name,))}


def divide_vectors(vectors: dict[Module, dict[str, Tensor]], shape: Architecture) -> dict[Module, dict[str, Tensor]]:
    """Give each part of a fused module its entries of vectors by output column, in the order of `divide`."""
    if not shape.fused:
        return vectors
    found: dict[Module, dict[str, Tensor]] = {}
    for (layer, name), kinds in vectors.items():
        parts = FUSED_MODULES.get(name, (name,))
        for kind, vector in kinds.items():
            if name == "qkv_proj":
                shape.order_heads(vector)
            for part, own in zip(parts, vector.split([shape.dims(each)[1] for each in parts]), strict=True):
                found.setdefault((layer, part), {})[kind] = own
    return found


def divide(adapter: AdapterWeights, shape: Architecture) -> AdapterWeights:
    """Give each part of a fused module its rows of B, and all of A. Reorders the rows of heads as the base has them."""
    if not shape.fused:
        return adapter
    weights: dict[Module, LoraWeight] = {}
    for (layer, name), weight in adapter.weights.items():
        if name == "qkv_proj":
            shape.order_heads(weight.b)
        offset = weight.b_offset
        for part in FUSED_MODULES.get(name, (name,)):
            out = weight.out_features if part == name else shape.dims(part)[1]
            weights[layer, part] = replace(weight, b_offset=offset, out_features=out)
            offset += out * weight.rank
    return replace(adapter, weights=weights)
