"""Logits: the projection onto the vocabulary, with each row's LoRA, in float32.

Logits of 16 bits would be rounded to steps of 0.06 at 16, which shows in logprobs.

Letters: T rows, K hidden width, N vocabulary.
"""

import torch
from torch import Tensor

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.row_subset import check_rows
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.token_rows import replace_logits


def logits(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    stack: LinearStack | None = None,  # of one slice
    batch: LoraBatch | None = None,
    *,
    columns: int | None = None,
) -> Tensor:
    """Compute logits with the batch's LoRA. Returns a new tensor, float32 [T, N].

    Semantics: `y[t] = gain * (W x[t] + s B A x[t]) + shift`, with A, B, s and column terms of row t's adapter. Where
    the adapter has its own row for a token, that row gives the logit.

    Args:
        columns: leading rows of the weight that are tokens; None for all. The result has no other columns, but those of
            `batch.more_ids`.
        batch: of exactly these rows, see `row_subset`; with its tiles on the device if its backend is csgmv.

    Raises:
        ValueError: `x` does not have the batch's number of rows, or the batch has segments but no tiles.
    """
    x = x.to(weight.dtype)
    y = _product(x, weight)[:, :columns]
    if batch is None or batch.implementation is None:
        return y
    check_rows(x, batch)
    if stack is not None and stack.holds_any(segment.slot for segment in batch.segments):
        if batch.implementation is csgmv:
            csgmv.add(x, y, stack, batch)
        else:  # merging the whole vocabulary never pays
            _add(x, y, stack, batch)
    if batch.more_ids:
        known, y = y, y.new_full((y.shape[0], y.shape[1] + batch.more_ids), -torch.inf)
        y[:, : known.shape[1]] = known
    if batch.token_rows is not None:
        tiles = batch.tiles if batch.implementation is csgmv else ()
        replace_logits(x, y, batch.token_rows, batch.segments, tiles)
    return y


def widened_bytes(rows: int, columns: int, more_ids: int) -> int:
    """Return the memory of the copy of logits that has columns for the token ids beyond the base model's."""
    return rows * (columns + more_ids) * torch.float32.itemsize if more_ids else 0


def _add(x: Tensor, y: Tensor, stack: LinearStack, batch: LoraBatch) -> None:
    for segment in batch.segments:
        meta, rows = stack.meta[segment.slot], slice(segment.start, segment.stop)
        rank = meta.ranks[0]
        if rank:
            hidden = _product(x[rows], stack.a[segment.slot, :rank])
            y[rows].add_(_product(hidden, stack.b[segment.slot, :, :rank]), alpha=meta.scalings[0])
    native.apply_terms(y, stack, batch)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x weight^T` in float32."""
    if weight.is_cuda and weight.dtype != torch.float32:
        return torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), weight.float().t())
