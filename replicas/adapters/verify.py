"""A PEFT folder, verified whole before any of it is served.

A key that matches no module, or a module without its keys, would make the adapter answer like the base model or like
half of itself; both are findings, and all findings are reported together.

Loads run beside the thread that launches batches, and every call into torch is a chance to lose the interpreter to it:
names and shapes are checked on the file's header, and the weights are read in one go.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranklet.replicas.adapters.peft_config import PeftConfig, read_peft_config
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import marks_of
from ranklet.replicas.errors import AdapterChanged, AdapterNotFound, InvalidAdapter
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import LORA_MODULES

# `base_model.model.` from PEFT, `model.` from causal-LM wrappers, `0.auto_model.` from sentence-transformers, or none.
_KEY = re.compile(
    r"(?P<prefix>(?:(?:base_model|model|auto_model|\d+)\.)*?)"
    r"(?P<module>(?:layers\.(?P<layer>\d+)\.(?:self_attn\.(?=[qkvo]_)|mlp\.(?=gate_|up_|down_)))?"
    r"(?P<name>[a-z]+_proj|embed_tokens))"
    r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)
# PEFT saves the base's own embedding beside an adapter that targets it, or whose vocabulary it believes resized.
_BASE_COPY = re.compile(r"(?:(?:base_model|model|auto_model|\d+)\.)*(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BYTES = {1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0", 2: "I16 U16 F16 BF16", 4: "I32 U32 F32", 8: "I64 U64 F64 C64"}
_WIDTHS = {dtype: width for width, dtypes in _BYTES.items() for dtype in dtypes.split()}
_CONVERTED = 1 << 22  # numbers that change their dtype at once
_MOST_HEADER = 100 << 20  # bytes; the library reads no more
_MAX_SHOWN = 12
Module = tuple[int, str]  # (layer, module); the embedding's layer is EMBEDDING
EMBEDDING = -1


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """The LoRA of one module: A [r, in] and B [out, r] at two places of the adapter's flat weights.

    `a` of the embedding is [r, vocab].
    """

    flat: Tensor
    a_at: int
    b_at: int
    rank: int
    wide: int
    out: int
    scaling: float

    @property
    def a(self) -> Tensor:
        return self.flat[self.a_at : self.a_at + self.rank * self.wide].view(self.rank, self.wide)

    @property
    def b(self) -> Tensor:
        return self.flat[self.b_at : self.b_at + self.out * self.rank].view(self.out, self.rank)


@dataclass(frozen=True)
class AdapterWeights:
    """A verified adapter: its weights end to end in the base's dtype, on the CPU, and where each is."""

    ref: AdapterRef
    flat: Tensor
    weights: dict[Module, LoraWeight]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(weight.rank for weight in self.weights.values())


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file, bytes
    nbytes: int


@dataclass(frozen=True)
class ExpectedModules:
    """What a pool can hold of an adapter."""

    architecture: Architecture
    max_rank: int
    modules: tuple[str, ...]
    bases: tuple[str, ...]
    embedding: Tensor  # the base's own, [vocab, hidden] on any device

    def places(self) -> list[Module]:
        """Every place of the base model that LoRA may target."""
        linear = self.architecture.module_dims()
        return [(EMBEDDING, "embed_tokens"), *((i, name) for i in range(self.architecture.layers) for name in linear)]

    def shapes(self, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B that a module of this name takes at this rank."""
        shape = self.architecture
        wide, out = (shape.vocab, shape.hidden) if name == "embed_tokens" else shape.module_dims()[name]
        return (rank, wide), (out, rank)


def read_adapter(ref: AdapterRef, expected: ExpectedModules, allocate: Allocate = pageable) -> AdapterWeights:
    """Read and verify an adapter folder.

    Args:
        allocate: makes the memory that it is read into.

    Raises:
        AdapterNotFound: the folder does not exist.
        AdapterChanged: its files are not those of the reference any more.
        InvalidAdapter: it cannot be served; every reason is listed.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter {ref.name!r}: expected a folder, {ref.path!r} does not exist", param="model")
    config, findings = read_peft_config(folder / CONFIG_FILE, expected.bases)
    path = folder / WEIGHTS_FILE
    stored, unreadable = _read_header(folder, path)
    findings += unreadable
    adapter = None
    if config is not None and not unreadable:
        pairs, names = _match(path, stored, config, expected, findings)
        sound = {
            place: sides
            for place, sides in pairs.items()
            if _fits(place, names[place], sides, config, expected, findings)
        }
        try:
            flat, at = _read_weights(path, sound, expected.embedding.dtype, allocate)
            adapter = AdapterWeights(ref, flat, {
                place: _weight(flat, at, sides["A"], sides["B"], config.scaling(names[place]))
                for place, sides in sound.items()
            })  # fmt: skip
            findings += _not_finite(adapter, names)
        except (OSError, EOFError) as error:
            findings.append(_unreadable(path, error))
    if ref.marks and marks_of(folder) != ref.marks:
        raise AdapterChanged(f"adapter {ref.name!r}: its files have changed while they were read. Try again")
    if findings or adapter is None:
        raise InvalidAdapter(ref.name, findings)
    return adapter


def _read_header(folder: Path, path: Path) -> tuple[list[_Stored], list[str]]:
    """What is in the file, in its order."""
    if not path.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        if pickles:
            return [], [f"{pickles[0]}: pickle is never read; expected {path.name} (PEFT: safe_serialization=True)"]
        return [], [f"{path.name}: expected the weights that PEFT saves; the file is missing"]
    try:
        start = _read_through_header(path)
        stored = []
        with safe_open(path, framework="np") as file:
            for key in file.offset_keys():
                tensor = file.get_slice(key)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in _WIDTHS:
                    return [], [f"{key}: expected float32, bfloat16 or float16, got {dtype}"]
                nbytes = math.prod(shape) * _WIDTHS[dtype]
                stored.append(_Stored(key, dtype, shape, start, nbytes))
                start += nbytes
    except (OSError, SafetensorError, ValueError) as error:
        return [], [_unreadable(path, error)]
    return stored, []


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path.name}: expected a whole safetensors file, got: {error}"


def _read_through_header(path: Path) -> int:
    """Bring the header into the page cache, since `safe_open` holds the GIL while it reads; where the data begins."""
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        for _ in range(0, min(size, _MOST_HEADER), 1 << 20):
            file.read(1 << 20)
    return 8 + size


def _read_weights(
    path: Path, pairs: dict[Module, dict[str, _Stored]], dtype: torch.dtype, allocate: Allocate
) -> tuple[Tensor, dict[str, int]]:
    """The tensors of these modules, end to end in `dtype`, and where each one begins.

    Raises:
        OSError, EOFError: the file cannot be read, or has become shorter.
    """
    wanted = sorted((tensor for sides in pairs.values() for tensor in sides.values()), key=lambda tensor: tensor.start)
    sizes = [math.prod(tensor.shape) for tensor in wanted]
    flat = allocate(sum(sizes), dtype)
    at = dict(zip((tensor.key for tensor in wanted), itertools.accumulate(sizes, initial=0), strict=False))
    with path.open("rb", buffering=0) as file:
        for run in _runs(wanted):
            file.seek(run[0].start)
            numbers = sum(math.prod(tensor.shape) for tensor in run)
            part = flat[at[run[0].key] : at[run[0].key] + numbers]
            saved = _DTYPES[run[0].dtype]
            for piece in (part,) if saved == dtype else part.split(_CONVERTED):
                raw = piece if saved == dtype else torch.empty(len(piece), dtype=saved)
                _fill(file, raw)
                if raw is not piece:
                    piece.copy_(raw)
    return flat, at


def _runs(stored: list[_Stored]) -> Iterator[list[_Stored]]:
    """Neighbours of one dtype."""
    run: list[_Stored] = []
    for tensor in stored:
        if run and (tensor.dtype != run[0].dtype or tensor.start != run[-1].start + run[-1].nbytes):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _fill(file: io.FileIO, tensor: Tensor) -> None:
    """Read as many bytes as the tensor has."""
    rest = tensor.view(-1).view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError("it ends before its last tensor")
        rest = rest[count:]


def _weight(flat: Tensor, at: dict[str, int], a: _Stored, b: _Stored, scaling: float) -> LoraWeight:
    return LoraWeight(flat, at[a.key], at[b.key], a.shape[0], a.shape[1], b.shape[0], scaling)


def _not_finite(adapter: AdapterWeights, names: dict[Module, str]) -> list[str]:
    least, most = torch.aminmax(adapter.flat) if len(adapter.flat) else (torch.zeros(()), torch.zeros(()))
    if math.isfinite(float(least)) and math.isfinite(float(most)):  # NaN is passed on; isfinite().all() takes ten times
        return []
    served = str(adapter.flat.dtype).removeprefix("torch.")
    return [
        f"{names[place]}: lora_{side}: expected numbers finite in {served}, got NaN or infinity"
        for place, weight in adapter.weights.items()
        for side, tensor in (("A", weight.a), ("B", weight.b))
        if not bool(torch.isfinite(tensor).all())
    ]


def _match(
    path: Path, stored: list[_Stored], config: PeftConfig, expected: ExpectedModules, findings: list[str]
) -> tuple[dict[Module, dict[str, _Stored]], dict[Module, str]]:
    """The tensors of each of the model's modules, by side, and its name; whatever fits none goes to `findings`."""
    pairs: dict[Module, dict[str, _Stored]] = {}
    names: dict[Module, str] = {}
    unmatched = []
    known = set(expected.places())
    prefix = _module_prefix(stored)
    for tensor in stored:
        key = tensor.key
        if _BASE_COPY.fullmatch(key):
            findings += _differs(path, tensor, expected.embedding)
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
    return pairs, names


def _differs(path: Path, stored: _Stored, embedding: Tensor) -> list[str]:
    """A finding unless the file's copy is the served base's embedding, up to the rounding of either's dtype."""
    key = stored.key
    if stored.shape != tuple(embedding.shape):
        return [f"{key}: expected the base's {list(embedding.shape)}, got {list(stored.shape)}; its vocabulary differs"]
    if stored.dtype not in _DTYPES:
        return [f"{key}: expected float32, bfloat16 or float16, got {stored.dtype}"]
    try:
        copy = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        with path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            _fill(file, copy)
    except (OSError, EOFError) as error:
        return [_unreadable(path, error)]
    if torch.equal(copy.to(embedding.device).to(embedding.dtype), embedding.to(copy.dtype).to(embedding.dtype)):
        return []
    return [f"{key}: differs from the served base's embedding; embeddings trained whole are not supported"]


def _module_prefix(stored: list[_Stored]) -> str:
    """What stood before `layers.` in the model the adapter was trained on; patterns in its config may name it."""
    found = next(filter(None, (_KEY.fullmatch(tensor.key) for tensor in stored)), None)
    return found["prefix"].removeprefix("base_model.model.") if found else ""


def _check_targets(
    pairs: dict[Module, dict[str, _Stored]],
    config: PeftConfig,
    expected: ExpectedModules,
    prefix: str,
    findings: list[str],
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
    place: Module,
    module: str,
    sides: dict[str, _Stored],
    config: PeftConfig,
    expected: ExpectedModules,
    findings: list[str],
) -> bool:
    before = len(findings)
    rank = config.rank(module)
    if rank > expected.max_rank:
        findings.append(f"{module}: expected a rank of at most {expected.max_rank} (engine.max_rank), got {rank}")
    for side, shape in zip("AB", expected.shapes(place[1], rank), strict=True):
        tensor = sides.get(side)
        if tensor is None:
            findings.append(f"{module}: expected lora_A and lora_B, lora_{side} is missing")
        elif tensor.shape != shape:
            findings.append(f"{module}: lora_{side}: expected shape {list(shape)}, got {list(tensor.shape)}")
        elif tensor.dtype not in _DTYPES:
            findings.append(f"{module}: lora_{side}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    return len(findings) == before


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_SHOWN])
    return shown if len(names) <= _MAX_SHOWN else f"{shown}, ... ({len(names) - _MAX_SHOWN} more)"
