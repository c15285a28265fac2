"""What each stage of a forward must at least do, in operations and in bytes of device memory. Pure arithmetic.

Letters: T tokens, H hidden width, r rank. A stage's floor assumes that it reads its input and its weights once, writes
its output once, and does nothing else: norms in one pass, q/k-norm and rotation inside the qkv product, SiLU inside the
gate_up product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ranklet.kernels.stack import PACKS
from ranklet.replicas.architecture import Architecture

STAGES = ("embed", "norm", "qkv", "attention", "o", "gate_up", "down", "pool")
_RESIDUAL_BYTES = 4  # an element of the residual stream


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
class Shape:
    """One batch."""

    lengths: Sequence[int]
    last_only: bool  # pooling reads last tokens alone, so the last layer computes no others
    element_bytes: int
    adapters: int = 0  # different ones in the batch
    adapted_tokens: int = 0
    ranks: Mapping[str, int] | None = None  # of each module that has LoRA


def costs(architecture: Architecture, batch: Shape) -> dict[str, Cost]:
    """Each stage's cost without LoRA, all layers together."""
    tokens, hidden, size = sum(batch.lengths), architecture.hidden, batch.element_bytes
    rows = [tokens] * (architecture.layers - 1) + [len(batch.lengths) if batch.last_only else tokens]
    found = dict.fromkeys(STAGES, Cost())
    found["embed"] = Cost(bytes=tokens * hidden * (size + _RESIDUAL_BYTES))
    found["norm"] = Cost(bytes=tokens * hidden * (_RESIDUAL_BYTES + size))  # the first; the others also add
    for layer, kept in enumerate(rows):
        adds = 2 if layer + 1 < architecture.layers else 1
        found["norm"] += Cost(bytes=adds * kept * hidden * (2 * _RESIDUAL_BYTES + 2 * size))
        found["attention"] += _attention(architecture, batch.lengths, kept, size)
        for name, modules in PACKS.items():
            through = tokens if name == "qkv" else kept
            found[name] += _product(architecture, name, modules, through, size)
    return found


def _product(architecture: Architecture, name: str, modules: Sequence[str], rows: int, size: int) -> Cost:
    dims = [architecture.module_dims()[module] for module in modules]
    wide, out = dims[0][0], sum(width for _, width in dims)
    written = out // 2 if name == "gate_up" else out
    return Cost(2.0 * rows * wide * out, (rows * (wide + written) + wide * out) * size)


def _attention(architecture: Architecture, lengths: Sequence[int], kept: int, size: int) -> Cost:
    width, queries, keys = architecture.head_dim, architecture.heads, architecture.kv_heads
    tokens = sum(lengths)
    seen = sum(lengths) if kept < tokens else sum(length * (length + 1) / 2 for length in lengths)
    return Cost(4.0 * seen * queries * width, (2 * kept * queries + 2 * tokens * keys) * width * size)


def lora_costs(architecture: Architecture, batch: Shape) -> dict[str, Cost]:
    """What LoRA adds to each stage: its two products, every adapter's A and B read once, h and x read once more."""
    found: dict[str, Cost] = {}
    kept = min(len(batch.lengths), batch.adapted_tokens) if batch.last_only else batch.adapted_tokens
    for name, modules in PACKS.items():
        total = Cost()
        for layer in range(architecture.layers):
            last = layer + 1 == architecture.layers and name != "qkv"
            rows, ranks = kept if last else batch.adapted_tokens, batch.ranks or {}
            for module in modules:
                (wide, out), rank = architecture.module_dims()[module], ranks.get(module, 0)
                weights = batch.adapters * rank * (wide + out)
                total += Cost(2.0 * rows * rank * (wide + out), (weights + 2 * rows * rank) * batch.element_bytes)
            if any(ranks.get(module) for module in modules):
                total += Cost(bytes=rows * architecture.module_dims()[modules[0]][0] * batch.element_bytes)
        if total.operations:
            found[name] = total
    return found
