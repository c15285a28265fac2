"""Checks the sizes of an adapter's numbers: they must be finite and not overflow, and should change an answer."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ranklet.replicas.adapters.adapter import AdapterWeights, ColumnTerms, LoraWeight
from ranklet.replicas.adapters.findings import Checked, join
from ranklet.replicas.model.modules import Module

_LARGEST = 1e15  # of an output in float32 and bfloat16; later layers square it
_LARGEST_HALF = 6e4
_INPUT = 10.0  # number of standard deviations within which inputs are
_LEAST_EFFECT = 1e-20  # of B A x, relative to x; the base's own weights round it away


def check_magnitudes(
    adapter: AdapterWeights, names: dict[Module, str], *, alone: bool = True
) -> Checked[tuple[str, ...]]:
    """Yield numbers that are not finite, and an alpha of 0. Return notes on modules without an effect.

    Args:
        names: full names of the modules.
        alone: whether the adapter has nothing but these weights.
    """
    largest = _largest(adapter.flat) if len(adapter.flat) else 0.0
    if not math.isfinite(largest):
        yield from _not_finite(adapter, names)
        return ()
    yield from _overflowing(adapter, names, largest)
    unscaled = [names[module] for module, weight in adapter.weights.items() if weight.scaling == 0]
    if unscaled and alone and len(unscaled) == len(adapter.weights):
        yield "lora_alpha: expected a number other than 0; with 0, the adapter answers as the base model does"
    elif unscaled:
        return (f"alpha is 0 for {len(unscaled)} modules, which stay as in the base model: {join(unscaled)}",)
    elif alone and adapter.weights and all(map(_vanishes, adapter.weights.values())):  # ends at the first that does not
        return ("all of its weights are 0 or nearly 0, so it answers as the base model does",)
    return ()


def _not_finite(adapter: AdapterWeights, names: dict[Module, str]) -> Checked[None]:
    served = str(adapter.flat.dtype).removeprefix("torch.")
    for module, weight in adapter.weights.items():
        for side, tensor in (("A", weight.a), ("B", weight.b)):
            if not bool(torch.isfinite(tensor).all()):
                yield f"{names[module]}: lora_{side}: expected numbers finite in {served}, got NaN or infinity"


def _overflowing(adapter: AdapterWeights, names: dict[Module, str], largest: float) -> Checked[None]:
    """Probe modules whose output may be so large that a later layer cannot square it."""
    limit = _limit(adapter.flat.dtype)
    found = [
        names[module]
        for module, weight in adapter.weights.items()
        if _bound(weight, largest) > limit and not _typical_output(weight) < limit
    ]
    yield from overflow(found, adapter.flat.dtype)


def overflows(terms: ColumnTerms, magnitude: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether shifts, or a magnitude of DoRA, which is the output's size, are too large for later layers."""
    vectors = [terms.shift] if magnitude is None else [terms.shift, magnitude]
    return not all(_largest(vector) <= _limit(dtype) for vector in vectors)


def overflow(modules: Collection[str], dtype: torch.dtype) -> Iterator[str]:
    """Yield the finding about modules whose outputs overflow in the dtype that is served."""
    if modules:
        limit, served = _limit(dtype), str(dtype).removeprefix("torch.")
        yield f"{len(modules)} modules give outputs beyond {limit:g}, which overflow in {served}: {join(modules)}"


def _limit(dtype: torch.dtype) -> float:
    return _LARGEST_HALF if dtype == torch.float16 else _LARGEST


def _bound(weight: LoraWeight, largest: float) -> float:
    return abs(weight.scaling) * weight.rank * weight.in_features * largest * largest * _INPUT


def _typical_output(weight: LoraWeight) -> float:
    """Return the root mean square of B A x for an x as large as those behind a norm."""
    x = torch.randn(weight.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = weight.scaling * (weight.b.double() @ (weight.a.double() @ x))
    return float(y.square().mean().sqrt())


def _vanishes(weight: LoraWeight) -> bool:
    return abs(weight.scaling) * weight.rank * _largest(weight.a) * _largest(weight.b) < _LEAST_EFFECT


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite. Takes a tenth of the time of `isfinite().all()`."""
    return math.isfinite(_largest(tensor))


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value; NaN if a number is NaN."""
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))
