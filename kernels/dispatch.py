"""Chooses the LoRA backend of a batch, and computes a model's projections with it.

"auto" chooses the most precise backend: `csgmv` on a GPU, `native` on a CPU. "fastest" chooses the backend with the
shortest expected time, by measurements of the GPU (`crossover.py`) or else by estimates (`cost_model.py`).

In 16 bits on a GPU, `merged` rounds its weights, and with `native`, cuBLAS rounds the product before adding it to the
output. On an H200, a 28-layer model's cosine to float32 is 0.99993 with csgmv and 0.99986 with merged.

Letters: T rows (tokens), K input width, N output width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from ranklet.kernels import base_gemm, csgmv, gated_mlp, native, pointwise
from ranklet.kernels.batch import Backend, LoraBatch
from ranklet.kernels.cost_model import LoraLayer, estimate_s
from ranklet.kernels.merged import Merged
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.kernels.token_rows import replace_embeddings

NAMES = (native.NAME, csgmv.NAME, Merged.NAME)


class Backends:
    """The LoRA backends of one engine. A batch carries the one that `choose` set.

    Args:
        layer: the decoder layer that batches go through.
        merged_bytes: device memory for merged weights that the `merged` backend keeps between batches.

    Attributes:
        by_name: all backends except "none".
        merged: the `merged` backend, the only one with state.
    """

    def __init__(self, layer: LoraLayer, merged_bytes: int = 0) -> None:
        self.merged = Merged(merged_bytes)
        self.by_name: Mapping[str, Backend] = MappingProxyType(
            {native.NAME: native, csgmv.NAME: csgmv, Merged.NAME: self.merged}
        )
        self._layer = layer

    def choose(self, batch: LoraBatch, override: str = "auto") -> LoraBatch:
        """Return the batch with its backend set: "none" when no row has an adapter.

        Args:
            override: "auto", "fastest", or a backend's name.
        """
        if not batch.segments:
            return replace(batch, implementation=None)
        name = override
        if override == "auto":
            name = csgmv.NAME if self._layer.cuda else native.NAME
        elif override == "fastest":
            name = fastest(batch, self._layer)
        return replace(batch, implementation=self.by_name[name])


def fastest(batch: LoraBatch, layer: LoraLayer) -> str:
    if not layer.cuda:
        return native.NAME  # csgmv needs a GPU, and on a CPU fewer launches save nothing
    if layer.measured is not None:
        costs = layer.measured.ms(batch.lora_rows, batch.adapters, layer.rank)
    else:
        costs = estimate_s([segment.rows for segment in batch.segments], layer)
    return min(NAMES, key=costs.__getitem__)


def linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    stack: LinearStack | None,
    batch: LoraBatch,
) -> Tensor:
    """Compute a projection with the batch's LoRA. Returns a new tensor [T, N].

    Semantics: `y[t] = W x[t] + bias + s B A x[t]`, with A, B, s of row t's adapter.
    """
    if stack is None or batch.implementation is None:
        return functional.linear(x, weight, bias)
    return batch.implementation.linear(x, weight, bias, stack, batch)


def rotated(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    stack: LinearStack | None,
    batch: LoraBatch,
    rotary: Rotary,
) -> Tensor:
    """Compute packed queries, keys and values with the batch's LoRA. Returns a new tensor [T, N].

    Semantics: `y[t] = rotary(W x[t] + bias + s B A x[t])`, with A, B, s of row t's adapter.
    """
    if stack is None or batch.implementation is None:
        return base_gemm.base(x, weight, bias, rotary)
    if batch.implementation is csgmv:
        return csgmv.linear(x, weight, bias, stack, batch, rotary)
    return rotary.apply_(linear(x, weight, bias, stack, batch))


def gated(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [2 N, K], gate first
    bias: Tensor | None,  # [2 N]
    stack: LinearStack | None,
    batch: LoraBatch,
) -> Tensor:
    """Compute the gated activation of an MLP with the batch's LoRA on gate and up. Returns a new tensor [T, N].

    Semantics: `y[t] = silu(gate[t]) * up[t]`, where `(gate[t], up[t]) = linear(x)[t]`.
    """
    adapted = stack is not None and batch.reaches(stack)
    if adapted and batch.implementation is csgmv:
        assert stack is not None
        return csgmv.gated(x, weight, bias, stack, batch)
    if not adapted and bias is None and gated_mlp.can_gate(x, weight):
        return gated_mlp.gated(x, weight)
    if not adapted and base_gemm.may_widen(x):
        return pointwise.silu_mul(base_gemm.widened(x, weight, bias), x.dtype)
    return pointwise.silu_mul(linear(x, weight, bias, stack, batch))


def embedding(
    ids: Tensor,  # [T] integers in [0, V), or beyond if the row's adapter has the token
    table: Tensor,  # [V, N]
    stack: EmbeddingStack | None,
    batch: LoraBatch,
) -> Tensor:
    """Look up token embeddings with the batch's LoRA. Returns a new tensor [T, N].

    Semantics: `y[t] = gain * (table[ids[t]] + s B A[ids[t]]) + shift`, with A, B, s and column terms of row t's
    adapter, or the adapter's own row for the token.
    """
    known = ids.clamp(max=len(table) - 1) if batch.more_ids else ids
    if stack is None or batch.implementation is None:
        y = functional.embedding(known, table)
    else:
        y = batch.implementation.embedding(known, table, stack, batch)
    if batch.token_rows is not None:
        tiles = batch.tiles if batch.implementation is csgmv else ()
        replace_embeddings(ids, y, batch.token_rows, batch.segments, tiles)
    return y
