"""What each stage of a forward must at least do, in operations and in bytes of device memory. Pure arithmetic.

Letters: T tokens, H hidden width, r rank. A stage's floor assumes that it reads its input and its weights once, writes
its output once, and does nothing else: norms in one pass, q/k-norm and rotation inside the qkv product, SiLU inside the
gate_up product, LoRA on the way. So it holds however the stage is cut into kernels. What a small batch keeps in the L2
cache may be read faster than from memory: such a stage can be below its floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ranklet.kernels.packs import PACKS
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, Module

STAGES = ("embed", "norm", "qkv", "attention", "o", "gate_up", "down", "pool")
_RESIDUAL_BYTES = 4  # an element of the residual stream
_STAGE_OF = {module: stage for stage, modules in PACKS.items() for module in modules} | {EMBED_TOKENS: "embed"}


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def floor_s(self, ceilings: "Ceilings") -> float:
        """The least time it takes: whichever of the two ceilings is lower."""
        return max(self.operations / ceilings.operations_per_s, self.bytes / ceilings.bytes_per_s)

    def bound(self, ceilings: "Ceilings") -> str:
        """Which ceiling that is."""
        compute = self.operations / ceilings.operations_per_s >= self.bytes / ceilings.bytes_per_s
        return "compute" if compute else "memory"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device was seen to do: a large matrix product, and a large copy (bytes read and written)."""

    operations_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """One adapter's part of a batch."""

    tokens: int
    prompts: int
    ranks: Mapping[Module, int]  # of each module of each layer that it targets


@dataclass(frozen=True, slots=True)
class BatchShape:
    """One batch."""

    lengths: Sequence[int]
    last_only: bool  # pooling reads last tokens alone, so the last layer computes no others
    element_bytes: int
    adapted: Sequence[AdapterShare] = ()
    merged: bool = False  # LoRA is added to weights, not to rows


def costs(architecture: Architecture, batch: BatchShape) -> dict[str, Cost]:
    """Each stage's cost without LoRA, all layers together."""
    tokens, hidden, size = sum(batch.lengths), architecture.hidden, batch.element_bytes
    rows = [tokens] * (architecture.layers - 1) + [len(batch.lengths) if batch.last_only else tokens]
    found = dict.fromkeys(STAGES, Cost())
    found["embed"] = Cost(bytes=tokens * hidden * (size + _RESIDUAL_BYTES))
    found["norm"] = Cost(bytes=tokens * hidden * (_RESIDUAL_BYTES + size))  # the first; the others also add
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
    """How many keys the queries of one prompt see, added up; of its last query alone if `last`."""
    most = min(length, window or length)
    return most if last else most * (most + 1) // 2 + (length - most) * most


def lora_costs(architecture: Architecture, batch: BatchShape) -> dict[str, Cost]:
    """What LoRA adds to each stage that has any: B (A x) of every row, each adapter's A and B read once.

    Merged, it is B A instead, and the sum with W written and read again. Either is what that backend cannot do without:
    they round differently, so neither may stand in for the other.
    """
    found: dict[str, Cost] = {}
    for part in batch.adapted:
        for (layer, module), rank in part.ranks.items():
            stage = _STAGE_OF[module]
            narrow = batch.last_only and layer + 1 == architecture.layers and stage != "qkv"
            rows = part.prompts if narrow else part.tokens
            if layer == EMBEDDING:
                cost = _lookup(architecture.hidden, rank, rows)
            else:
                cost = _adapted(
                    *architecture.module_dims()[module], rank, None if batch.merged and not narrow else rows
                )
            found[stage] = found.get(stage, Cost()) + Cost(cost.operations, cost.bytes * batch.element_bytes)
    return found


def _lookup(hidden: int, rank: int, rows: int) -> Cost:
    """A token's column of A, times B; bytes as elements."""
    return Cost(2.0 * rows * rank * hidden, rank * (rows + hidden))


def _adapted(wide: int, out: int, rank: int, rows: int | None) -> Cost:
    """LoRA of one linear module on so many rows, or merged into its weight; bytes as elements."""
    if rows is None:
        return Cost(2.0 * rank * wide * out, rank * (wide + out) + 2 * wide * out)
    return Cost(2.0 * rows * rank * (wide + out), rank * (wide + out))
