"""Makes LoRA of adapters that change a weight by a Hadamard product (LoHa) or a Kronecker product (LoKr).

Both products are of low rank only approximately, so the error is measured. Formulas: PEFT's `loha` and `lokr` layers.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranklet.replicas.adapters.findings import shorten, show
from ranklet.replicas.conversion.stored_weights import ConversionError

METHODS = {"LOHA": "hada", "LOKR": "lokr"}
_KEPT = (
    "base_model_name_or_path", "task_type", "revision", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
)  # fmt: skip
_OVERSAMPLING = 16  # of the randomized SVD: Halko et al., "Finding structure with randomness", use 5 to 10
_ITERATIONS = 4


class LowRank(NamedTuple):
    """An approximation. `error` is the largest of the modules' errors, relative to the norm of their change."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    error: float
    worst: str  # the module of this error


def approximate(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], rank: int,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> LowRank:  # fmt: skip
    """Approximate each module's change by LoRA of a rank.

    Args:
        fields: the adapter's config.
        track: shows the progress over the modules.

    Raises:
        ConversionError: a tensor or a field has no such form.
    """
    kind = METHODS[fields["peft_type"]]
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name):
            raise ConversionError(f"{name}: expected none in {fields['peft_type']}, got {show(fields[name])}")
    scaling = _number(fields, "alpha") / _number(fields, "r")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"(?P<module>.+)\.{kind}_(?P<part>w1|w2|w1_a|w1_b|w2_a|w2_b)", name)
        if found is None or tensor.ndim != 2:
            raise ConversionError(f"{shorten(name)}: expected {fields['peft_type']} of linear layers only")
        parts.setdefault(found["module"], {})[found["part"]] = tensor.float()
    made: dict[str, Tensor] = {}
    error, worst = 0.0, ""
    for module in track(sorted(parts)):
        change = scaling * _change(module, kind, parts[module])
        b, a = _factors(change, rank)
        made[f"{module}.lora_A.weight"], made[f"{module}.lora_B.weight"] = a, b
        size = float(change.norm())
        relative = float((change - b @ a).norm()) / size if size else 0.0
        error, worst = max((error, worst), (relative, module))
    kept = {name: fields[name] for name in _KEPT if name in fields}
    return LowRank(made, {"peft_type": "LORA", **kept, "r": rank, "lora_alpha": rank}, error, worst)


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name, 8)  # PEFT's default of both
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConversionError(f"{name}: expected a number above 0, got {show(value)}")
    return float(value)


def _change(module: str, kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a module's change of its weight [out, in], without the scaling."""
    try:
        first, second = (_factor(parts, name) for name in ("w1", "w2"))
        return first * second if kind == "hada" else torch.kron(first, second)
    except (KeyError, RuntimeError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(parts.items()))
        raise ConversionError(f"{shorten(module)}: expected two factors that fit, got {shapes}") from None


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B [out, rank] and A [rank, in] with a product near the change. Equal changes give equal results."""
    most = min(change.shape)
    if rank + _OVERSAMPLING >= most:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            left, values, columns = torch.svd_lowrank(change, rank + _OVERSAMPLING, niter=_ITERATIONS)
            right = columns.T
    used = min(rank, len(values))
    root = values[:used].sqrt()
    b, a = left[:, :used] * root, root[:, None] * right[:used]
    if used < rank:  # the module is smaller than the rank
        b, a = torch.nn.functional.pad(b, (0, rank - used)), torch.nn.functional.pad(a, (0, 0, 0, rank - used))
    return b.contiguous(), a.contiguous()
