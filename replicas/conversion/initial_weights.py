"""Makes plain LoRA of adapters whose initialisation changed the base weights: PiSSA, OLoRA, CorDA, LoRA-GA.

Such an adapter belongs to W - s B0 A0, where A0 and B0 are its initial matrices and s its scaling. On W, its change is
s B A - s B0 A0: LoRA of twice the rank, [B, -B0] and [A; A0]. Source: PEFT, "Converting PiSSA to LoRA".
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ranklet.replicas.adapters.findings import shorten, show
from ranklet.replicas.adapters.tensor_names import parse_key, parse_term
from ranklet.replicas.conversion.stored_weights import ConversionError
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.checkpoint import Checkpoint
from ranklet.replicas.model.modules import Module, module_path

_SIDES = ("A", "B")
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")  # these leave the base as it was

Factors = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
Scaling = Callable[[str], float]  # by a tensor's name


class BaseWeights:
    """The base's weights in float32, until the context ends."""

    def __init__(self, model_dir: Path) -> None:
        self._shape = read_architecture(read_config(model_dir))
        self._checkpoint = Checkpoint(model_dir, torch.device("cpu"), torch.float32)

    def __enter__(self) -> Self:
        self._checkpoint.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoint.__exit__(kind, error, trace)

    def read(self, module: Module) -> Tensor:
        """Return a linear module's weight [out, in].

        Raises:
            ModelError: the base has no such module.
        """
        layer, name = module
        wide, out = self._shape.dims(name)
        return self._checkpoint.read(f"layers.{layer}.{module_path(name)}.weight", (out, wide))


def changes_base(init: Any) -> bool:
    return init not in _PLAIN


def has_known_factors(init: Any) -> bool:
    """Whether the initial matrices follow from the base's weights."""
    return isinstance(init, str) and init in _FACTORS


def initial_of(init: str, tensors: Mapping[str, Tensor], scaling: Scaling, base: BaseWeights) -> dict[str, Tensor]:
    """Compute the initial matrices of an adapter from the base's weights.

    Only their product counts, which the signs of singular vectors do not change.
    """
    found = {}
    for name, other in _pairs(tensors):
        key = parse_key(name)
        assert key is not None
        rank = len(tensors[name])
        a, b = _FACTORS[init](base.read(key.module), rank, scaling(name))
        found[name], found[other] = a, b
    return found


def plain_lora(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of twice the rank.

    DoRA's magnitudes and trained biases stay: the sum of W and the change, which DoRA normalises, is the same.

    Raises:
        ConversionError: the initial adapter has other tensors.
    """
    made = {name: tensor for name, tensor in tensors.items() if parse_term(name) is not None}
    for name, other in _pairs(tensors):
        for each in (name, other):
            if each not in initial or initial[each].shape != tensors[each].shape:
                got = list(initial[each].shape) if each in initial else "none"
                raise ConversionError(
                    f"{shorten(each)}: expected an initial tensor of shape {list(tensors[each].shape)}, got {got}"
                )
        made[name] = torch.cat([tensors[name].float(), initial[name].float()])
        made[other] = torch.cat([tensors[other].float(), -initial[other].float()], 1)
    return made


def doubled_ranks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of twice the rank, with the same scaling of each module."""
    factor = 2**0.5 if fields.get("use_rslora") else 2
    return {
        **fields,
        "init_lora_weights": True,
        "r": 2 * fields.get("r", 8),
        "lora_alpha": factor * fields.get("lora_alpha", 8),
        "rank_pattern": {name: 2 * rank for name, rank in (fields.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (fields.get("alpha_pattern") or {}).items()},
    }


def _pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the names of A and B of each module.

    Raises:
        ConversionError: a tensor is no matrix of a linear layer's LoRA.
    """
    sides: dict[Module, dict[str, str]] = {}
    for name in tensors:
        if parse_term(name) is not None:
            continue
        key = parse_key(name)
        if key is None or "embedding" in name:
            raise ConversionError(f"{shorten(name)}: expected LoRA of linear layers, which only are initialised so")
        sides.setdefault(key.module, {})[key.side] = name
    for module, found in sides.items():
        if found.keys() != set(_SIDES):
            raise ConversionError(f"{show(module)}: expected A and B, got {', '.join(found)}")
    return [(found["A"], found["B"]) for found in sides.values()]


def _pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


_FACTORS: dict[str, Factors] = {"pissa": _pissa, "olora": _olora}
