"""Verifies a PEFT folder completely before any of it is served.

Serving an adapter with a key that matches no module, or a module without its keys, would give the base model's vectors
or wrong ones. Both are findings. All findings are reported together.
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ranklet.replicas.adapters.adapter import AdapterWeights, LoraWeight
from ranklet.replicas.adapters.findings import Checked, collect, join, shorten
from ranklet.replicas.adapters.peft_config import LoraSettings, read_peft_config
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import marks_of
from ranklet.replicas.adapters.safetensors_file import (
    DTYPES,
    StoredTensor,
    UnreadableWeightsError,
    read_header,
    read_tensor,
    read_tensors,
)
from ranklet.replicas.errors import AdapterChanged, AdapterNotFound, InvalidAdapter
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, LORA_MODULES, Module, module_path

# `base_model.model.` from PEFT, `model.` from causal-LM wrappers, `0.auto_model.` from sentence-transformers, or none.
_KEY = re.compile(
    r"(?P<prefix>(?:(?:base_model|model|auto_model|\d+)\.)*?)"
    r"(?:layers\.(?P<layer>\d+)\.(?:self_attn\.(?=[qkvo]_)|mlp\.(?=gate_|up_|down_)))?"
    r"(?P<name>[a-z]+_proj|embed_tokens)"
    r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)
_MAX_KEY_CHARS = 512
# PEFT saves the base's own embedding beside an adapter that targets it, or whose vocabulary it takes for resized.
_BASE_COPY = re.compile(r"(?:(?:base_model|model|auto_model|\d+)\.)*(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight")
_FLOATS = "float32, bfloat16 or float16"

Pairs = dict[Module, dict[str, StoredTensor]]  # the tensors of each module, by side: A or B


@dataclass(frozen=True)
class ExpectedModules:
    """The modules, shapes and base model that an adapter is verified against.

    Attributes:
        bases: names (fnmatch patterns) of the base model.
        embedding: the base model's token embedding [vocab, hidden], on any device.
    """

    architecture: Architecture
    max_rank: int
    modules: tuple[str, ...]
    bases: tuple[str, ...]
    embedding: Tensor

    def every_module(self) -> list[Module]:
        """Return every module of the base model that LoRA may target."""
        linear = self.architecture.module_dims()
        return [(EMBEDDING, EMBED_TOKENS), *((i, name) for i in range(self.architecture.layers) for name in linear)]

    def shapes(self, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B of a module of this name at this rank."""
        shape = self.architecture
        wide, out = (shape.vocab, shape.hidden) if name == EMBED_TOKENS else shape.module_dims()[name]
        return (rank, wide), (out, rank)


def read_adapter(ref: AdapterRef, expected: ExpectedModules, allocate: Allocate = pageable) -> AdapterWeights:
    """Read and verify an adapter folder.

    Args:
        allocate: makes the memory for the weights.

    Raises:
        AdapterNotFound: the folder does not exist.
        AdapterChanged: its files are no longer those of the reference.
        InvalidAdapter: it cannot be served; the error lists every reason.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter {ref.name!r}: expected a folder, {ref.path!r} does not exist", param="model")
    adapter, findings = collect(_verify(ref, folder, expected, allocate))
    if ref.marks and marks_of(folder) != ref.marks:
        raise AdapterChanged(f"adapter {ref.name!r}: its files have changed while they were read. Try again")
    if findings or adapter is None:
        raise InvalidAdapter(ref.name, findings)
    return adapter


def _verify(
    ref: AdapterRef, folder: Path, expected: ExpectedModules, allocate: Allocate
) -> Checked[AdapterWeights | None]:
    path = folder / WEIGHTS_FILE
    config = yield from read_peft_config(folder / CONFIG_FILE, expected.bases)
    stored = yield from _read_header(path)
    prefix = _module_prefix(stored or ())
    names = {module: prefix + _path_in_model(module) for module in expected.every_module()}
    settings = (yield from config.apply(names.values())) if config is not None else None
    if settings is None or stored is None:
        return None
    try:
        pairs = yield from _match(path, stored, names.keys(), expected.embedding)
        yield from _check_targets(pairs, names, settings, expected)
        sound: Pairs = {}
        for module, sides in pairs.items():
            if (yield from _check_pair(module, names[module], sides, settings, expected)):
                sound[module] = sides
        adapter = _read(ref, path, sound, names, settings, expected.embedding.dtype, allocate)
    except UnreadableWeightsError as error:
        yield str(error)
        return None
    yield from _check_finite(adapter, names)
    return adapter


def _read_header(path: Path) -> Checked[list[StoredTensor] | None]:
    if not path.is_file():
        yield _missing_weights(path)
        return None
    try:
        return read_header(path)
    except UnreadableWeightsError as error:
        yield str(error)
        return None


def _missing_weights(path: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in path.parent.glob(pattern))
    if pickles:
        return f"{shorten(pickles[0])}: pickle is never read; expected {path.name} (PEFT: safe_serialization=True)"
    return f"{path.name}: expected the weights that PEFT saves; the file is missing"


def _module_prefix(stored: Iterable[StoredTensor]) -> str:
    """Return the names before `layers.` in the model that was trained; patterns in the config may contain them."""
    found = next(filter(None, (_parse(tensor.key) for tensor in stored)), None)
    return found["prefix"].removeprefix("base_model.model.") if found else ""


def _path_in_model(module: Module) -> str:
    layer, name = module
    return name if layer == EMBEDDING else f"layers.{layer}.{module_path(name)}"


def _parse(key: str) -> re.Match[str] | None:
    return _KEY.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None


def _match(
    path: Path, stored: Iterable[StoredTensor], modules: Collection[Module], embedding: Tensor
) -> Checked[Pairs]:
    pairs: Pairs = {}
    unmatched = []
    for tensor in stored:
        found = _parse(tensor.key)
        if found is None and len(tensor.key) <= _MAX_KEY_CHARS and _BASE_COPY.fullmatch(tensor.key):
            yield from _check_base_copy(path, tensor, embedding)
            continue
        module = (int(found["layer"] or EMBEDDING), found["name"]) if found else None
        if (
            found is None
            or module is None
            or module not in modules
            or bool(found["embedding"]) != (module[1] == EMBED_TOKENS)
        ):
            unmatched.append(tensor.key)
            continue
        sides = pairs.setdefault(module, {})
        if found["side"] in sides:
            yield f"{tensor.key}: a second tensor for layer {module[0]} {module[1]}; expected one"
        sides[found["side"]] = tensor
    if unmatched:
        yield f"{len(unmatched)} tensors match no module of the base model: {join(unmatched)}"
    return pairs


def _check_base_copy(path: Path, stored: StoredTensor, embedding: Tensor) -> Checked[None]:
    """Compare the file's copy with the served base's embedding, up to the rounding of either's dtype."""
    key = shorten(stored.key)
    if stored.shape != tuple(embedding.shape):
        yield f"{key}: expected the base's {list(embedding.shape)}, got {list(stored.shape)}; its vocabulary differs"
    elif stored.dtype not in DTYPES:
        yield f"{key}: expected {_FLOATS}, got {stored.dtype}"
    else:
        copy = read_tensor(path, stored)
        ours = embedding.to(copy.dtype).to(embedding.dtype)
        if not torch.equal(copy.to(embedding.device).to(embedding.dtype), ours):
            yield f"{key}: differs from the served base's embedding; embeddings trained whole are not supported"


def _check_targets(
    pairs: Pairs, names: dict[Module, str], settings: LoraSettings, expected: ExpectedModules
) -> Checked[None]:
    targeted = {module for module, name in names.items() if settings.targets(name)}
    missing = [names[module] for module in targeted - pairs.keys()]
    if missing:
        yield f"{len(missing)} modules that target_modules names have no tensors: {join(missing)}"
    untargeted = [names[module] for module in pairs.keys() - targeted]
    if untargeted:
        yield f"{len(untargeted)} modules have tensors but target_modules leaves them out: {join(untargeted)}"
    if not pairs:
        yield f"target_modules: expected some of {', '.join(LORA_MODULES)}; no tensor belongs to one"
    unserved = sorted({name for _, name in pairs} - set(expected.modules))
    if unserved:
        yield f"{', '.join(unserved)}: this server keeps no slots for them; add them to engine.lora_modules"


def _check_pair(
    module: Module, name: str, sides: dict[str, StoredTensor], settings: LoraSettings, expected: ExpectedModules
) -> Checked[bool]:
    sound = True
    rank = settings.rank(name)
    if rank > expected.max_rank:
        sound = False
        yield f"{name}: expected a rank of at most {expected.max_rank} (engine.max_rank), got {shorten(str(rank))}"
    for side, shape in zip("AB", expected.shapes(module[1], rank), strict=True):
        tensor = sides.get(side)
        if tensor is not None and tensor.shape == shape and tensor.dtype in DTYPES:
            continue
        sound = False
        if tensor is None:
            yield f"{name}: expected lora_A and lora_B, lora_{side} is missing"
        elif tensor.shape != shape:
            yield f"{name}: lora_{side}: expected shape {shorten(str(list(shape)))}, got {list(tensor.shape)}"
        else:
            yield f"{name}: lora_{side}: expected {_FLOATS}, got {tensor.dtype}"
    return sound


def _read(
    ref: AdapterRef, path: Path, pairs: Pairs, names: dict[Module, str], settings: LoraSettings, dtype: torch.dtype,
    allocate: Allocate,
) -> AdapterWeights:  # fmt: skip
    tensors = (tensor for sides in pairs.values() for tensor in sides.values())
    flat, offsets = read_tensors(path, tensors, dtype, allocate)
    weights = {}
    for module, sides in pairs.items():
        a, b = sides["A"], sides["B"]
        weights[module] = LoraWeight(
            flat, offsets[a.key], offsets[b.key], a.shape[0], a.shape[1], b.shape[0], settings.scaling(names[module])
        )  # fmt: skip
    return AdapterWeights(ref, flat, weights)


def _check_finite(adapter: AdapterWeights, names: dict[Module, str]) -> Checked[None]:
    least, most = torch.aminmax(adapter.flat) if len(adapter.flat) else (torch.zeros(()), torch.zeros(()))
    if math.isfinite(float(least)) and math.isfinite(float(most)):  # ten times faster than isfinite().all()
        return
    served = str(adapter.flat.dtype).removeprefix("torch.")
    for module, weight in adapter.weights.items():
        for side, tensor in (("A", weight.a), ("B", weight.b)):
            if not bool(torch.isfinite(tensor).all()):
                yield f"{names[module]}: lora_{side}: expected numbers finite in {served}, got NaN or infinity"
