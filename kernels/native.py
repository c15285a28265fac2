"""LoRA with torch's own matrix products: one call per segment and slice, on any device.

Scalings are Python floats, so no call waits for the device. They are factors of B's product, where the library
applies them in float32.

Letters as in `stack.py`; T rows (tokens) of the batch. After PEFT's `adapter_names` forward and SGLang's torch-native
backend.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.row_subset import check_rows
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import EmbeddingStack, LinearStack

NAME = "native"


def linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    stack: LinearStack,
    batch: LoraBatch,
) -> Tensor:
    """Compute a projection with LoRA. Returns a new tensor [T, N].

    Semantics: `y[t] = gain * (W x[t] + bias + s B A x[t]) + shift`, with A, B, s and column terms of row t's adapter.

    LoRA is written first and the base product accumulates onto it, which saves a pass over y. On the CPU the sum is
    rounded once; cuBLAS rounds a 16-bit product before it adds it to y.

    Raises:
        ValueError: `x` does not have the batch's number of rows.
    """
    check_rows(x, batch)
    if not stack.holds_any(segment.slot for segment in batch.segments):
        return functional.linear(x, weight, bias)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    for segment in batch.segments:
        expand_(y, x, stack, segment)
    end = batch.lora_rows
    if bias is not None:
        y[:end] += bias
    y[:end].addmm_(x[:end], weight.t())
    apply_terms(y, stack, batch)
    if end < batch.rows:
        y[end:] = functional.linear(x[end:], weight, bias)
    return y


def apply_terms(y: Tensor, stack: LinearStack | EmbeddingStack, batch: LoraBatch) -> None:
    """Apply the column terms of a batch's adapters to their rows of `y` [T, N], in place."""
    terms = batch.terms_of(stack)
    if terms is None:
        return
    for segment in batch.segments:
        if stack.meta[segment.slot].terms:
            gain, shift = terms[segment.slot]
            rows = y[segment.start : segment.stop]
            rows.copy_(torch.addcmul(shift, rows.float(), gain))


def expand_(
    y: Tensor,  # [T, N]
    x: Tensor,  # [T, K]
    stack: LinearStack,
    segment: Segment,
) -> None:
    """Compute the LoRA of one segment. Overwrites its rows of `y`.

    Semantics: `y[t] = s B A x[t]`, zero in slices that the adapter does not target.
    """
    meta = stack.meta[segment.slot]
    rows = slice(segment.start, segment.stop)
    hidden = shrink(x[rows], stack, segment.slot)
    column = position = 0
    for width, rank, scaling in zip(stack.widths, meta.ranks, meta.scalings, strict=True):
        out = y[rows, column : column + width]
        if rank:
            b = stack.b[segment.slot, column : column + width, :rank]
            out.addmm_(hidden[:, position : position + rank], b.t(), beta=0, alpha=scaling)
        else:
            out.zero_()
        position += rank
        column += width


def shrink(
    x: Tensor,  # [T, K]
    stack: LinearStack,
    slot: int,
) -> Tensor:
    """Compute `A x[t]` of one adapter. Returns [T, sum of its ranks]: the targeted slices side by side, no padding."""
    ranks = stack.meta[slot].ranks
    if not any(ranks):
        return x[:, :0]
    a = stack.a[slot]
    if all(rank == stack.rank for rank in ranks):
        return torch.mm(x, a.t())
    parts = [torch.mm(x, a[i * stack.rank : i * stack.rank + rank].t()) for i, rank in enumerate(ranks) if rank]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def embedding(
    ids: Tensor,  # [T] integers in [0, V)
    table: Tensor,  # [V, N]
    stack: EmbeddingStack,
    batch: LoraBatch,
) -> Tensor:
    """Look up token embeddings with LoRA. Returns a new tensor [T, N].

    Semantics: `y[t] = gain * (table[ids[t]] + s B A[ids[t]]) + shift`, with A, B, s and column terms of row t's
    adapter.
    """
    y = functional.embedding(ids, table)
    for segment in batch.segments:
        meta = stack.meta[segment.slot]
        rank = meta.ranks[0]
        if rank:
            rows = slice(segment.start, segment.stop)
            hidden = functional.embedding(ids[rows], stack.a[segment.slot])[:, :rank]
            y[rows].addmm_(hidden, stack.b[segment.slot, :, :rank].t(), alpha=meta.scalings[0])
    apply_terms(y, stack, batch)
    return y
