"""Which backend serves a batch, and the calls the model makes whatever the answer is.

"fastest" takes the one that should need least time: a pure function of the batch's rows and adapters, the layer's
dimensions, and what was measured on the GPU (`crossover.py`). Where nothing was measured, a cost model decides: bytes
and operations against two ceilings. "auto" keeps to the backend that rounds nothing but its output.

They differ on a GPU in 16 bits, where `merged` rounds its weights and cuBLAS rounds native's product before it adds it
to what is there: on an H200 a 28-layer model's cosine to float32 is 0.99993 with csgmv and 0.99986 with merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from ranklet.kernels import csgmv, fused_gemm, gated_mlp, merged, native, pointwise
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.crossover import Scope, Surface
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.stack import EmbeddingStack, LinearStack


class Backend(Protocol):
    """What each backend offers; shapes as in `native.py`."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch
    ) -> Tensor: ...

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: LoraBatch) -> Tensor: ...


# A process serves one engine; an engine with a budget for kept copies puts its own `Merged` here.
BACKENDS: dict[str, Backend] = {"native": native, "csgmv": csgmv, "merged": merged.MERGED}


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What a choice depends on besides the batch."""

    projections: tuple[tuple[int, tuple[int, ...]], ...]  # input width and slices' output widths of each with LoRA
    rank: int  # of the pool
    cuda: bool
    measured: Surface | None = None


def scope_of(projections: Sequence[object]) -> Scope:
    """The measurements that fit a layer with LoRA on these projections."""
    return "attention" if len(projections) <= 2 else "layer"


def choose(batch: LoraBatch, layer: LayerInfo, override: str = "auto") -> LoraBatch:
    """The batch with its backend set: "none" when no row has an adapter.

    Args:
        override: "auto", "fastest", or a backend's name.
    """
    if not batch.segments:
        return replace(batch, backend="none")
    if override == "auto":
        return replace(batch, backend="csgmv" if layer.cuda else "native")
    return replace(batch, backend=fastest(batch, layer) if override == "fastest" else override)


def fastest(batch: LoraBatch, layer: LayerInfo) -> str:
    """The name of the backend that should take least time for the batch."""
    if not layer.cuda:
        return "native"  # csgmv is for GPUs, and a CPU gains nothing from fewer launches
    if layer.measured is not None:
        costs = layer.measured.ms(batch.lora_rows, batch.adapters, layer.rank)
    else:
        costs = modelled([segment.rows for segment in batch.segments], layer)
    return min(BACKENDS, key=costs.__getitem__)


# Of a Hopper card; choices depend on their ratios alone, which change little from one data-centre GPU to the next.
_BYTES_PER_S = 4e12
_FLOPS = 6.5e14
_LAUNCH_S = 6e-6
_ELEMENT_BYTES = 2
_FUSED_LOSS = 0.1  # how much slower than cuBLAS the fused product is


def modelled(rows: Sequence[int], layer: LayerInfo) -> dict[str, float]:
    """Estimated seconds by backend for one layer's LoRA, given the rows of each adapter."""
    costs = dict.fromkeys(("native", "csgmv", "merged"), 0.0)
    for wide, widths in layer.projections:
        out, slices, total = sum(widths), len(widths), sum(rows)
        base = _time(total * (wide + out) + wide * out, 2.0 * total * wide * out)
        shrink = [_time(n * (wide + slices * layer.rank), 2.0 * n * wide * slices * layer.rank) for n in rows]
        expand = [_time(2 * n * out + out * layer.rank, 2.0 * n * out * layer.rank) for n in rows]
        weights = len(rows) * layer.rank * (slices * wide + out)
        costs["native"] += base + sum(
            max(a, _LAUNCH_S) + max(b, slices * _LAUNCH_S) for a, b in zip(shrink, expand, strict=True)
        )
        added = min(sum(expand), _FUSED_LOSS * base + _time(0, 2.0 * total * out * layer.rank))
        costs["csgmv"] += base + sum(shrink) + added + _time(weights, 0.0) + 2 * _LAUNCH_S
        merge = max(_time(3 * wide * out, 2.0 * wide * out * layer.rank), (1 + slices) * _LAUNCH_S)
        costs["merged"] += sum(
            merge + max(_time(n * (wide + out) + wide * out, 2.0 * n * wide * out), _LAUNCH_S) for n in rows
        )
    return costs


def _time(elements: float, operations: float) -> float:
    return max(elements * _ELEMENT_BYTES / _BYTES_PER_S, operations / _FLOPS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack | None, batch: LoraBatch) -> Tensor:
    """A projection of the base model with the batch's LoRA on it: x [T, K], weight [N, K] -> [T, N]."""
    if stack is None or batch.backend == "none":
        return functional.linear(x, weight, bias)
    return BACKENDS[batch.backend].linear(x, weight, bias, stack, batch)


def rotated(
    x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack | None, batch: LoraBatch, rotary: Rotary
) -> Tensor:
    """`linear` of the packed queries, keys and values, and what becomes of queries and keys after it."""
    if stack is None or batch.backend == "none":
        return fused_gemm.base(x, weight, bias, rotary)
    if batch.backend == "csgmv":
        return csgmv.linear(x, weight, bias, stack, batch, rotary)
    return rotary.apply_(linear(x, weight, bias, stack, batch))


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack | None, batch: LoraBatch) -> Tensor:
    """`linear` of the packed gate and up, and `silu(gate) * up` of it: x [T, K], weight [2 N, K] -> [T, N]."""
    adapted = stack is not None and stack.holds_any(segment.slot for segment in batch.segments)
    if not adapted and bias is None and gated_mlp.can_gate(x, weight):
        return gated_mlp.gated(x, weight)
    if not adapted and fused_gemm.may_widen(x):
        return pointwise.silu_mul(fused_gemm.widened(x, weight, bias), x.dtype)
    return pointwise.silu_mul(linear(x, weight, bias, stack, batch))


def embedding(ids: Tensor, table: Tensor, stack: EmbeddingStack | None, batch: LoraBatch) -> Tensor:
    """The token embedding with the batch's LoRA on it: ids [T], table [V, N] -> [T, N]."""
    if stack is None or batch.backend == "none":
        return functional.embedding(ids, table)
    return BACKENDS[batch.backend].embedding(ids, table, stack, batch)
