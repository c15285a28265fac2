"""Reads what DoRA and trained biases change: a gain and a shift for each output column of a module.

PEFT's definitions, with W and b of the base, A, B and s of the adapter:

- DoRA: `y = m / |W + s B A| * (W x + s B A x) + b`, with the norm of each row, which does not depend on x. For the
  token embedding, whose rows are tokens, it is the norm of each column.
- `bias`: the adapter's own b takes the place of the base's.
- `lora_bias`: `y = W x + b + s (B A x + c)`, with c in the file.

All three are `gain * (W x + b + s B A x) + shift`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from ranklet.replicas.adapters.adapter import AdapterWeights, ColumnTerms, LoraWeight
from ranklet.replicas.adapters.findings import Checked, join, shorten
from ranklet.replicas.adapters.fused import divide_vectors, parts_of
from ranklet.replicas.adapters.magnitudes import overflow, overflows
from ranklet.replicas.adapters.own_stream import own_stream
from ranklet.replicas.adapters.peft_config import LoraSettings
from ranklet.replicas.adapters.pinned_memory import pageable
from ranklet.replicas.adapters.safetensors_file import DTYPES, read_tensors
from ranklet.replicas.adapters.safetensors_header import StoredTensor
from ranklet.replicas.adapters.tensor_names import EMBEDDING_MODULE
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.base_linears import BaseLinears
from ranklet.replicas.model.modules import EMBEDDING, Module

_AT_ONCE = 1 << 24  # numbers of a weight in float32, of which two copies exist for a moment
_computing = Lock()  # loads run on several threads, and memory of the device is scarce
_KEYS = {"magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias", "bias": "bias"}
_FIELDS = {"magnitude": "use_dora", "lora_bias": "lora_bias", "bias": "bias"}

StoredTerms = dict[Module, dict[str, StoredTensor]]  # by module, by key of `_KEYS`


def check_terms(
    stored: StoredTerms, targeted: Collection[Module], names: Mapping[Module, str], settings: LoraSettings,
    base: BaseLinears, widths: Mapping[str, int], served: Collection[str],
) -> Checked[bool]:  # fmt: skip
    """Compare the file's vectors with those that its config asks for. Returns whether they can be used.

    Args:
        targeted: modules with LoRA.
        widths: output columns of each module, by name.
        served: names of the modules that have slots.
    """
    linear = {module for module in names if module != EMBEDDING_MODULE}
    biased = {module for module in linear if not base.with_bias.isdisjoint(parts_of([module[1]]))}
    trained = {"lora_only": biased & set(targeted), "all": biased}.get(settings.bias, set())
    wanted: dict[str, Collection[Module]] = {
        "magnitude": targeted if settings.uses_dora else (),
        "lora_bias": targeted if settings.has_lora_bias else (),
        "bias": trained,
    }
    sound = True
    for kind, modules in wanted.items():
        may = names.keys() if kind == "magnitude" else linear
        outside = [names[module] for module in modules if module not in may]
        have = {module for module, kinds in stored.items() if kind in kinds}
        missing = [names[module] for module in modules if module in may and module not in have]
        extra = [names[module] for module in have - set(modules)]
        if outside:
            yield f"{_FIELDS[kind]}: not supported on {join(outside)}; leave them out of target_modules"
        if missing:
            yield f"{_FIELDS[kind]}: expected {_KEYS[kind]} of each module, {len(missing)} have none: {join(missing)}"
        if extra:
            yield f"{_FIELDS[kind]}: {len(extra)} modules have {_KEYS[kind]}, which it leaves out: {join(extra)}"
        sound = sound and not (outside or missing or extra)
    unserved = parts_of(name for layer, name in stored if (layer, name) not in targeted) - {*served}
    if unserved:
        sound = False
        yield f"{join(unserved)}: this server keeps no slots for them; add them to engine.lora_modules"
    for module, kinds in stored.items():
        for kind, tensor in kinds.items():
            shape = (widths[module[1]],)
            if tensor.shape != shape:
                yield f"{names[module]}: {_KEYS[kind]}: expected shape {list(shape)}, got {list(tensor.shape)}"
            elif tensor.dtype not in DTYPES:
                yield f"{names[module]}: {_KEYS[kind]}: expected {', '.join(DTYPES)}, got {shorten(tensor.dtype)}"
            else:
                continue
            sound = False
    return sound


def read_terms(
    path: Path,
    stored: StoredTerms,
    adapter: AdapterWeights,
    names: Mapping[Module, str],
    base: BaseLinears,
    shape: Architecture,
) -> Checked[dict[Module, ColumnTerms]]:
    """Read checked vectors, and compute gains and shifts. Returns none where the base's weights are not at hand.

    Args:
        adapter: divided as the base's modules are.

    Raises:
        UnreadableWeightsError: the file cannot be read.
    """
    tensors = [tensor for kinds in stored.values() for tensor in kinds.values()]
    flat, offsets = read_tensors(path, tensors, torch.float32, pageable)
    if not bool(torch.isfinite(flat).all()):
        for module, kinds in stored.items():
            for kind, tensor in kinds.items():
                if not bool(torch.isfinite(_vector(flat, offsets, tensor)).all()):
                    yield f"{names[module]}: {_KEYS[kind]}: expected finite numbers, got NaN or infinity"
        return {}
    found: dict[Module, ColumnTerms] = {}
    if base.read is None:
        return found
    vectors = {
        module: {kind: _vector(flat, offsets, tensor) for kind, tensor in kinds.items()}
        for module, kinds in stored.items()
    }
    too_large, dtype = [], adapter.flat.dtype
    for (layer, name), own in divide_vectors(vectors, shape).items():
        weight, bias = base.read(layer, name)
        lora = adapter.weights.get((layer, name))
        terms = _terms(weight, bias, lora, own, looked_up=layer == EMBEDDING)
        at = name if layer < 0 else f"layer {layer} {name}"
        if overflows(terms, own.get("magnitude"), dtype):
            too_large.append(at)
        if not bool(torch.isfinite(terms.gain).all()):
            yield f"{at}: the norm of a row of W + s B A, by which DoRA divides, is 0 or not finite"
        found[layer, name] = terms
    yield from overflow(too_large, dtype)
    return found


def _vector(flat: Tensor, offsets: Mapping[str, int], tensor: StoredTensor) -> Tensor:
    return flat[offsets[tensor.key] :][: tensor.shape[0]]


@torch.no_grad()
def _terms(
    weight: Tensor, bias: Tensor | None, lora: LoraWeight | None, vectors: Mapping[str, Tensor], *, looked_up: bool
) -> ColumnTerms:
    width = weight.shape[1] if looked_up else len(weight)
    with _computing, own_stream(weight.device):
        own = torch.zeros(width) if bias is None else bias.float().cpu()
        gain = torch.ones(width)
        if "magnitude" in vectors and lora is not None:
            norms = _embedding_norms(weight, lora) if looked_up else _row_norms(weight, lora)
            gain = vectors["magnitude"] / norms.cpu()
    shift = vectors.get("bias", own) - gain * own
    if "lora_bias" in vectors and lora is not None:
        shift = shift + lora.scaling * vectors["lora_bias"]
    return ColumnTerms(gain, shift)


def _row_norms(weight: Tensor, lora: LoraWeight) -> Tensor:
    """Return the norms of the rows of W + s B A."""
    a, b = (side.to(weight.device).float() for side in (lora.a, lora.b))
    at_once = max(1, _AT_ONCE // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(rows.float(), some_b, a, alpha=lora.scaling), dim=1)
        for rows, some_b in zip(weight.split(at_once), b.split(at_once), strict=True)
    ]
    return torch.cat(norms)


def _embedding_norms(weight: Tensor, lora: LoraWeight) -> Tensor:
    """Return the norms of the columns of the token embedding, [V, H], with LoRA."""
    a, b = (side.to(weight.device).float() for side in (lora.a, lora.b))
    at_once = max(1, _AT_ONCE // weight.shape[1])
    squares = [
        torch.addmm(rows.float(), some_a.t(), b.t(), alpha=lora.scaling).square_().sum(0)
        for rows, some_a in zip(weight.split(at_once), a.split(at_once, dim=1), strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()
