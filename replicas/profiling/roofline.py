"""Roofline model: the fewest operations and bytes of device memory that each stage of a forward pass needs.

A stage's floor is its least possible time: it reads its input and its weights once and writes its output once. A norm
is one pass. The q/k norms and the rotation belong to the qkv product, SiLU to the gate_up product, and LoRA to its
stage, so the floor does not depend on the division into kernels. A stage of a small batch can be faster than its floor,
because it may read from the L2 cache instead of memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ranklet.kernels.packs import PACKS
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, HEAD, Module

STAGES = ("embed", "norm", "qkv", "attention", "o", "gate_up", "down", "pool")
_RESIDUAL_BYTES = 4  # of one element
_STAGE_OF = {module: stage for stage, modules in PACKS.items() for module in modules} | {EMBED_TOKENS: "embed"}


@dataclass(frozen=True, slots=True)
class Cost:
    """The operations of a stage and the bytes that it reads and writes."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def floor_s(self, ceilings: "Ceilings") -> float:
        return max(self.operations / ceilings.operations_per_s, self.bytes / ceilings.bytes_per_s)

    def bound(self, ceilings: "Ceilings") -> str:
        compute = self.operations / ceilings.operations_per_s >= self.bytes / ceilings.bytes_per_s
        return "compute" if compute else "memory"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The measured rates of a device: of a large matrix product, and of a large copy (bytes read and written)."""

    operations_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """The part of a batch that uses one adapter."""

    tokens: int
    prompts: int
    ranks: Mapping[Module, int]  # LoRA rank of each targeted module


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The dimensions of a batch that determine its cost."""

    lengths: Sequence[int]
    last_only: bool  # pooling reads only last tokens, so the last layer computes no others
    element_bytes: int
    shares: Sequence[AdapterShare] = ()
    merged: bool = False  # LoRA is added to the weights instead of the rows


def base_costs(architecture: Architecture, batch: BatchShape) -> dict[str, Cost]:
    """Return the cost of each stage without LoRA, summed over all layers."""
    tokens, hidden, size = sum(batch.lengths), architecture.hidden, batch.element_bytes
    rows = [tokens] * (architecture.layers - 1) + [len(batch.lengths) if batch.last_only else tokens]
    found = dict.fromkeys(STAGES, Cost())
    found["embed"] = Cost(bytes=tokens * hidden * (size + _RESIDUAL_BYTES))
    found["norm"] = Cost(bytes=tokens * hidden * (_RESIDUAL_BYTES + size))  # the first norm; later ones also add
    for layer, kept in enumerate(rows):
        adds = 2 if layer + 1 < architecture.layers else 1
        found["norm"] += Cost(bytes=adds * kept * hidden * (2 * _RESIDUAL_BYTES + 2 * size))
        last = batch.last_only and layer + 1 == architecture.layers
        found["attention"] += _attention(architecture, architecture.windows[layer], batch.lengths, size, last=last)
        for name, modules in PACKS.items():
            through = tokens if name == "qkv" else kept
            found[name] += _product(architecture, name, modules, through, size)
    found["pool"] = Cost(bytes=(rows[-1] * (_RESIDUAL_BYTES + size) + len(batch.lengths) * _RESIDUAL_BYTES) * hidden)
    return found


def _product(architecture: Architecture, name: str, modules: Sequence[str], rows: int, size: int) -> Cost:
    dims = [architecture.module_dims()[module] for module in modules]
    wide, out = dims[0][0], sum(width for _, width in dims)
    written = out // 2 if name == "gate_up" else out
    return Cost(2.0 * rows * wide * out, (rows * (wide + written) + wide * out) * size)


def _attention(
    architecture: Architecture, window: int | None, lengths: Sequence[int], size: int, *, last: bool
) -> Cost:
    width, queries, keys = architecture.head_dim, architecture.heads, architecture.kv_heads
    seen = sum(_pairs(length, window, last=last) for length in lengths)
    asked = len(lengths) if last else sum(lengths)
    read = seen if last else sum(lengths)
    return Cost(4.0 * seen * queries * width, 2 * (asked * queries + read * keys) * width * size)


def _pairs(length: int, window: int | None, *, last: bool) -> int:
    """Return the number of (query, key) pairs of one prompt, only those of its last query if `last`."""
    most = min(length, window or length)
    return most if last else most * (most + 1) // 2 + (length - most) * most


def lora_costs(architecture: Architecture, batch: BatchShape) -> dict[str, Cost]:
    """Return the cost that LoRA adds to each stage with an adapted module.

    Unmerged, LoRA computes B (A x) for every row and reads each adapter's A and B once. Merged, it computes B A, writes
    W + B A and reads it again. The two round differently, so each backend has its own floor.
    """
    found: dict[str, Cost] = {}
    for share in batch.shares:
        for (layer, module), rank in share.ranks.items():
            if layer == HEAD:
                continue  # pooling reads no logits
            stage = _STAGE_OF[module]
            narrow = batch.last_only and layer + 1 == architecture.layers and stage != "qkv"
            rows = share.prompts if narrow else share.tokens
            if layer == EMBEDDING:
                cost = _embedding_lora(architecture.hidden, rank, rows)
            elif batch.merged and not narrow:
                cost = _merged_lora(*architecture.module_dims()[module], rank)
            else:
                cost = _linear_lora(*architecture.module_dims()[module], rank, rows)
            found[stage] = found.get(stage, Cost()) + Cost(cost.operations, cost.bytes * batch.element_bytes)
    return found


# The costs below count bytes as elements.


def _embedding_lora(hidden: int, rank: int, rows: int) -> Cost:
    return Cost(2.0 * rows * rank * hidden, rank * (rows + hidden))


def _linear_lora(wide: int, out: int, rank: int, rows: int) -> Cost:
    return Cost(2.0 * rows * rank * (wide + out), rank * (wide + out))


def _merged_lora(wide: int, out: int, rank: int) -> Cost:
    return Cost(2.0 * rank * wide * out, rank * (wide + out) + 2 * wide * out)
