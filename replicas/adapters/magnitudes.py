"""Checks the sizes of an adapter's numbers: they must be finite, and should be large enough to change an answer."""

import math

import torch
from torch import Tensor

from ranklet.replicas.adapters.adapter import AdapterWeights, LoraWeight
from ranklet.replicas.adapters.findings import Checked, join
from ranklet.replicas.model.modules import Module

_LEAST_EFFECT = 1e-20  # of B A x, relative to x; the base's own weights round it away


def check_magnitudes(adapter: AdapterWeights, names: dict[Module, str]) -> Checked[tuple[str, ...]]:
    """Yield numbers that are not finite, and an alpha of 0. Return notes on modules without an effect.

    Args:
        names: full names of the modules.
    """
    yield from _check_finite(adapter, names)
    unscaled = [names[module] for module, weight in adapter.weights.items() if weight.scaling == 0]
    if unscaled and len(unscaled) == len(adapter.weights):
        yield "lora_alpha: expected a number other than 0; with 0, the adapter answers as the base model does"
    elif unscaled:
        return (f"alpha is 0 for {len(unscaled)} modules, which stay as in the base model: {join(unscaled)}",)
    elif adapter.weights and all(map(_vanishes, adapter.weights.values())):  # it ends at the first that does not
        return ("all of its weights are 0 or nearly 0, so it answers as the base model does",)
    return ()


def _check_finite(adapter: AdapterWeights, names: dict[Module, str]) -> Checked[None]:
    least, most = torch.aminmax(adapter.flat) if len(adapter.flat) else (torch.zeros(()), torch.zeros(()))
    if math.isfinite(float(least)) and math.isfinite(float(most)):  # ten times faster than isfinite().all()
        return
    served = str(adapter.flat.dtype).removeprefix("torch.")
    for module, weight in adapter.weights.items():
        for side, tensor in (("A", weight.a), ("B", weight.b)):
            if not bool(torch.isfinite(tensor).all()):
                yield f"{names[module]}: lora_{side}: expected numbers finite in {served}, got NaN or infinity"


def _vanishes(weight: LoraWeight) -> bool:
    return abs(weight.scaling) * weight.rank * _largest(weight.a) * _largest(weight.b) < _LEAST_EFFECT


def _largest(tensor: Tensor) -> float:
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))
