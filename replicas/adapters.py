"""A PEFT folder, verified whole before any of it is served.

A key that matches no module, or a module without its keys, would make the adapter answer like the base model or like
half of itself; both are findings, and all findings are reported together.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranklet.replicas.architecture import Architecture
from ranklet.replicas.config import LORA_MODULES
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter
from ranklet.replicas.peft_config import PeftConfig, read_peft_config
from ranklet.replicas.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef

# `base_model.model.` from PEFT, `model.` from causal-LM wrappers, `0.auto_model.` from sentence-transformers, or none.
_KEY = re.compile(
    r"(?P<prefix>(?:(?:base_model|model|auto_model|\d+)\.)*?)"
    r"(?P<module>(?:layers\.(?P<layer>\d+)\.(?:self_attn\.(?=[qkvo]_)|mlp\.(?=gate_|up_|down_)))?"
    r"(?P<name>[a-z]+_proj|embed_tokens))"
    r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)
# PEFT saves the base's own embedding beside an adapter that targets it, or whose vocabulary it believes resized.
_BASE_COPY = re.compile(r"(?:(?:base_model|model|auto_model|\d+)\.)*(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAX_SHOWN = 12
Place = tuple[int, str]  # (layer, module); the embedding's layer is EMBEDDING
EMBEDDING = -1


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """The LoRA of one module."""

    a: Tensor  # [r, in]; of the embedding [r, vocab]
    b: Tensor  # [out, r]
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A verified adapter: its weights by place, on the CPU, as saved."""

    ref: AdapterRef
    weights: dict[Place, LoraWeight]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(weight.rank for weight in self.weights.values())


@dataclass(frozen=True)
class Expectation:
    """What a pool can hold of an adapter."""

    architecture: Architecture
    max_rank: int
    modules: tuple[str, ...]
    bases: tuple[str, ...]
    embedding: Tensor  # the base's own, [vocab, hidden] on any device

    def places(self) -> list[Place]:
        """Every place of the base model that LoRA may target."""
        linear = self.architecture.module_dims()
        return [(EMBEDDING, "embed_tokens"), *((i, name) for i in range(self.architecture.layers) for name in linear)]

    def shapes(self, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B that a module of this name takes at this rank."""
        shape = self.architecture
        wide, out = (shape.vocab, shape.hidden) if name == "embed_tokens" else shape.module_dims()[name]
        return (rank, wide), (out, rank)


def read_adapter(ref: AdapterRef, expected: Expectation) -> Adapter:
    """Read and verify an adapter folder.

    Raises:
        AdapterNotFound: the folder does not exist.
        InvalidAdapter: it cannot be served; every reason is listed.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter {ref.name!r}: expected a folder, {ref.path!r} does not exist", param="model")
    config, findings = read_peft_config(folder / CONFIG_FILE, expected.bases)
    tensors, unreadable = _read_tensors(folder)
    findings += unreadable
    weights: dict[Place, LoraWeight] = {}
    if config is not None and not unreadable:
        weights = _match(tensors, config, expected, findings)
    if findings:
        raise InvalidAdapter(ref.name, findings)
    return Adapter(ref, weights)


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        if pickles:
            return {}, [f"{pickles[0]}: pickle is never read; expected {path.name} (PEFT: safe_serialization=True)"]
        return {}, [f"{path.name}: expected the weights that PEFT saves; the file is missing"]
    try:
        _read_through(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, []  # noqa: SIM118 - safe_open is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        return {}, [f"{path.name}: expected a whole safetensors file, got: {error}"]


def _read_through(path: Path) -> None:
    """Bring a file into the page cache: `safe_open` holds the GIL, so every batch would wait for a slow disk."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _match(
    tensors: dict[str, Tensor], config: PeftConfig, expected: Expectation, findings: list[str]
) -> dict[Place, LoraWeight]:
    """Pair the tensors with the model's modules, adding to `findings` whatever does not fit."""
    pairs: dict[Place, dict[str, Tensor]] = {}
    names: dict[Place, str] = {}
    unmatched = []
    known = set(expected.places())
    prefix = _module_prefix(tensors)
    for key, tensor in tensors.items():
        if _BASE_COPY.fullmatch(key):
            findings += _differs(key, tensor, expected.embedding)
            continue
        found = _KEY.fullmatch(key)
        place = (int(found["layer"] or EMBEDDING), found["name"]) if found else None
        if found is None or place not in known or bool(found["embedding"]) != (place[1] == "embed_tokens"):
            unmatched.append(key)
            continue
        side = str(found["side"])
        if side in pairs.setdefault(place, {}):
            findings.append(f"{key}: a second tensor for layer {place[0]} {place[1]}; expected one")
        pairs[place][side] = tensor
        names[place] = prefix + found["module"]
    if unmatched:
        findings.append(f"{len(unmatched)} tensors match no module of the base model: {_some(unmatched)}")
    _check_targets(pairs, config, expected, prefix, findings)
    return {
        place: LoraWeight(sides["A"], sides["B"], config.scaling(names[place]))
        for place, sides in pairs.items()
        if _fits(place, names[place], sides, config, expected, findings)
    }


def _differs(key: str, copy: Tensor, embedding: Tensor) -> list[str]:
    """A finding unless `copy` is the served base's embedding, up to the rounding of either's dtype."""
    if tuple(copy.shape) != tuple(embedding.shape):
        return [
            f"{key}: expected the base's shape {list(embedding.shape)}, got {list(copy.shape)}; its vocabulary differs"
        ]
    if torch.equal(copy.to(embedding.device).to(embedding.dtype), embedding.to(copy.dtype).to(embedding.dtype)):
        return []
    return [f"{key}: differs from the served base's embedding; embeddings trained whole are not supported"]


def _module_prefix(tensors: dict[str, Tensor]) -> str:
    """What stood before `layers.` in the model the adapter was trained on; patterns in its config may name it."""
    found = next(filter(None, (_KEY.fullmatch(key) for key in tensors)), None)
    return found["prefix"].removeprefix("base_model.model.") if found else ""


def _check_targets(
    pairs: dict[Place, dict[str, Tensor]], config: PeftConfig, expected: Expectation, prefix: str, findings: list[str]
) -> None:
    missing, untargeted = [], []
    for layer, name in expected.places():
        group = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        module = prefix + (name if layer == EMBEDDING else f"layers.{layer}.{group}.{name}")
        targeted, present = config.targets(module), (layer, name) in pairs
        if targeted and not present:
            missing.append(module)
        if present and not targeted:
            untargeted.append(module)
    if missing:
        findings.append(f"{len(missing)} modules that target_modules names have no tensors: {_some(missing)}")
    if untargeted:
        findings.append(
            f"{len(untargeted)} modules have tensors but target_modules leaves them out: {_some(untargeted)}"
        )
    if not pairs:
        findings.append(f"target_modules: expected some of {', '.join(LORA_MODULES)}; no tensor belongs to one")
    unserved = sorted({name for _, name in pairs} - set(expected.modules))
    if unserved:
        findings.append(f"{', '.join(unserved)}: this server keeps no slots for them; add them to engine.lora_modules")


def _fits(
    place: Place, module: str, sides: dict[str, Tensor], config: PeftConfig, expected: Expectation, findings: list[str]
) -> bool:
    before = len(findings)
    served = str(expected.embedding.dtype).removeprefix("torch.")
    rank = config.rank(module)
    if rank > expected.max_rank:
        findings.append(f"{module}: expected a rank of at most {expected.max_rank} (engine.max_rank), got {rank}")
    for side, shape in zip("AB", expected.shapes(place[1], rank), strict=True):
        tensor = sides.get(side)
        if tensor is None:
            findings.append(f"{module}: expected lora_A and lora_B, lora_{side} is missing")
        elif tuple(tensor.shape) != shape:
            findings.append(f"{module}: lora_{side}: expected shape {list(shape)}, got {list(tensor.shape)}")
        elif tensor.dtype not in _DTYPES:
            findings.append(f"{module}: lora_{side}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        elif not bool(torch.isfinite(tensor.to(expected.embedding.dtype)).all()):
            findings.append(f"{module}: lora_{side}: expected numbers finite in {served}, got NaN or infinity")
    return len(findings) == before


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_SHOWN])
    return shown if len(names) <= _MAX_SHOWN else f"{shown}, ... ({len(names) - _MAX_SHOWN} more)"
