"""Which backend serves a batch, and the two calls the model makes whatever the answer is."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.stack import EmbeddingStack, LinearStack


class Backend(Protocol):
    """What each backend module offers; shapes as in `native.py`."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch
    ) -> Tensor: ...

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: LoraBatch) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"native": native, "csgmv": csgmv}


def choose(batch: LoraBatch, override: str = "auto", *, cuda: bool = False) -> LoraBatch:
    """The batch with its backend set: "none" when no row has an adapter, else the override or the fastest."""
    if not batch.segments:
        return replace(batch, backend="none")
    fastest = "csgmv" if cuda else "native"
    return replace(batch, backend=fastest if override == "auto" else override)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack | None, batch: LoraBatch) -> Tensor:
    """A projection of the base model with the batch's LoRA on it: x [T, K], weight [N, K] -> [T, N]."""
    if stack is None or batch.backend == "none":
        return functional.linear(x, weight, bias)
    return BACKENDS[batch.backend].linear(x, weight, bias, stack, batch)


def embedding(ids: Tensor, table: Tensor, stack: EmbeddingStack | None, batch: LoraBatch) -> Tensor:
    """The token embedding with the batch's LoRA on it: ids [T], table [V, N] -> [T, N]."""
    if stack is None or batch.backend == "none":
        return functional.embedding(ids, table)
    return BACKENDS[batch.backend].embedding(ids, table, stack, batch)
