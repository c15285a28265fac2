"""Causal attention within each sequence of a packed batch.

`attend` chooses the implementation. Sequences whose keys are all in the batch use cuDNN if the spans have cuDNN's
offsets, else torch's varlen kernel for 16-bit tensors on a GPU, else a loop over the sequences. Sequences with keys in
pages use the kernels for pages.

Letters: T tokens, Q query heads, G key heads, D head width, B sequences.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels.paged_attention import decode
from ranklet.kernels.paged_spans import LayerPages, PagedSpans
from ranklet.kernels.prefill_attention import prefill
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.cudnn_attention import CudnnSpans


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each sequence of a packed batch begins and ends. All keys of these sequences are in the batch."""

    lengths: tuple[int, ...]  # tokens of each sequence
    offsets: Tensor  # int32 [B + 1] on the device: cumulative lengths, starting at 0
    longest: int  # upper bound on the lengths
    cudnn: CudnnSpans | None = None  # None if cuDNN is not used
    # int32 [B]: first packed token of each sequence; for a filler, a row that belongs to no sequence. None if the
    # sequences lie side by side.
    starts: Tensor | None = None
    skipped: Tensor | None = None  # int32 [B]: first tokens of each sequence that pooling leaves out; None for none


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The spans of a packed batch, by where their keys are. Each token belongs to at most one span.

    Attributes:
        fresh: sequences whose keys are all in the batch.
        chunks: parts of prompts whose earlier keys are in pages.
        decodes: sequences with one token in the batch.
        kv_slots: int32 [T]: where each token's key and value are stored, as in `KvWrite`; None if none are stored.
        ends: int32 [B]: last packed token of each span, in the order of the batch's outputs. None if the batch
            consists of `fresh` only.
    """

    fresh: Spans | None = None
    chunks: PagedSpans | None = None
    decodes: PagedSpans | None = None
    kv_slots: Tensor | None = None
    ends: Tensor | None = None


def reads_lengths_on_device(device: torch.device, dtype: torch.dtype, windows: Sequence[int | None]) -> bool:
    """Whether attention kernels read the lengths from device memory, so that one CUDA graph serves other lengths."""
    if device.type != "cuda" or dtype not in _VARLEN_DTYPES:
        return False
    takes_windows = _varlen_takes_windows()  # imports the kernel before the first step
    return takes_windows or all(window is None for window in windows)


def last_rows(batch: Spans | AttentionBatch) -> Tensor:
    """Return the last packed token of each span, [B]."""
    if isinstance(batch, AttentionBatch):
        if batch.ends is not None:
            return batch.ends
        assert batch.fresh is not None
        batch = batch.fresh
    return batch.offsets[1:] - 1 if batch.starts is None else batch.starts + batch.offsets.diff() - 1


def attend(
    qkv: Tensor, batch: Spans | AttentionBatch, pages: LayerPages | None, heads: tuple[int, int], head_dim: int,
    window: int | None, *, last: bool = False, arrivals: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute grouped-query causal attention within each sequence.

    Args:
        qkv: [T, (Q + 2 G) * D], after normalization and rotation.
        pages: of the layer, which already hold the keys and values of this batch. None if all spans are fresh.
        heads: (Q, G).
        head_dim: D.
        window: number of tokens that each token attends to, itself included; None for no limit.
        last: compute only the last token of each sequence.
        arrivals: as in `paged_attention.decode`.

    Returns:
        [T, Q * D], or [B, Q * D] if `last`. Rows of tokens that belong to no span are undefined.
    """
    spans = _only_fresh(batch)
    if spans is not None and spans.starts is None:
        window = _needed(window, spans)
        if last and window is None:
            return _attend_last(qkv, spans, heads, head_dim)
        out = _attend_all(qkv, spans, heads, head_dim, window)
    else:
        out = torch.empty(len(qkv), heads[0] * head_dim, dtype=qkv.dtype, device=qkv.device)
        mixed = batch if isinstance(batch, AttentionBatch) else AttentionBatch(batch)
        _attend_mixed(qkv, mixed, pages, heads, head_dim, window, out, arrivals)
    return out[last_rows(batch)] if last else out


def _only_fresh(batch: Spans | AttentionBatch) -> Spans | None:
    if isinstance(batch, Spans):
        return batch
    return batch.fresh if batch.chunks is None and batch.decodes is None else None


def _needed(window: int | None, spans: Spans) -> int | None:
    return None if window is not None and window >= spans.longest else window


def _attend_mixed(
    qkv: Tensor, batch: AttentionBatch, pages: LayerPages | None, heads: tuple[int, int], head_dim: int,
    window: int | None, out: Tensor, arrivals: Tensor | None,
) -> None:  # fmt: skip
    if batch.fresh is not None:
        _attend_scattered(qkv, batch.fresh, heads, head_dim, _needed(window, batch.fresh), out)
    if batch.chunks is not None:
        assert pages is not None
        prefill(qkv, batch.chunks, pages, heads, window, out)
    if batch.decodes is not None:
        assert pages is not None
        decode(qkv, batch.decodes, pages, heads, window, out, arrivals)


def _attend_scattered(
    qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None, out: Tensor
) -> None:
    """Overwrite the rows of `out` of sequences that do not lie side by side."""
    cudnn = spans.cudnn if window is None else None
    if cudnn and cudnn_attention.attend(qkv, cudnn, spans.longest, heads, head_dim, out) is not None:
        return
    rows = torch.arange(len(qkv), device=qkv.device)  # of any lengths, since a CUDA graph serves others too
    rows = torch.where(rows < spans.offsets[-1], rows, 0)
    index = rows
    if spans.starts is not None:
        owner = torch.searchsorted(spans.offsets[1:], rows, right=True)
        index = rows + (spans.starts - spans.offsets[:-1])[owner]
    attended = _attend_all(qkv[index], replace(spans, cudnn=None), heads, head_dim, window)
    out[index] = attended[rows]


def _attend_all(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None) -> Tensor:
    if spans.cudnn is not None and window is None:
        out = cudnn_attention.attend(qkv, spans.cudnn, spans.longest, heads, head_dim)
        if out is not None:
            return out
    q, k, v = _split(qkv, heads, head_dim)
    if _takes_varlen(qkv) and (window is None or _varlen_takes_windows()):
        attended = _varlen(q, k, v, spans, window)
    else:
        attended = _by_sequence(q, k, v, spans.lengths, window)
    return attended.reshape(len(qkv), -1)


def _attend_last(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int) -> Tensor:
    q, k, v = _split(qkv, heads, head_dim)
    q = q[spans.offsets[1:] - 1]
    if _takes_varlen(qkv):
        query_offsets = torch.arange(len(q) + 1, dtype=torch.int32, device=qkv.device)
        options = _varlen_options(causal=False)
        out = _varlen_attn()(q, k, v, query_offsets, spans.offsets, 1, spans.longest, **options)
        assert isinstance(out, Tensor)
    else:
        own_keys, own_values = (part.transpose(0, 1).split(spans.lengths, 1) for part in (k, v))
        sequences = zip(q.unsqueeze(2), own_keys, own_values, strict=True)
        grouped = heads[0] != heads[1]
        out = torch.stack(
            [functional.scaled_dot_product_attention(a, b, c, enable_gqa=grouped) for a, b, c in sequences]
        )
    return out.reshape(len(q), -1)


def _split(qkv: Tensor, heads: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = heads
    q, k, v = qkv.view(len(qkv), queries + 2 * keys, head_dim).split((queries, keys, keys), dim=1)
    return q, k, v


def _takes_varlen(qkv: Tensor) -> bool:
    return qkv.is_cuda and qkv.dtype in _VARLEN_DTYPES


def _varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None) -> Tensor:
    options = dict(_varlen_options(causal=True))
    if "window_size" in options:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    out = _varlen_attn()(q, k, v, spans.offsets, spans.offsets, spans.longest, spans.longest, **options)
    assert isinstance(out, Tensor)  # it returns a tuple only if auxiliary outputs are requested
    return out


def _varlen_takes_windows() -> bool:
    return "window_size" in _varlen_options(causal=True)


@cache
def _varlen_attn() -> Callable[..., Any]:
    # The import takes a second, since it imports torch's compiler: an engine on the CPU does without.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _varlen_options(*, causal: bool) -> dict[str, Any]:
    # torch 2.11 and later releases name the options of a grouped-query call differently.
    known = inspect.signature(_varlen_attn()).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


_VARLEN_DTYPES = (torch.bfloat16, torch.float16)


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    out = torch.empty_like(q)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        one, two, three = (part[rows].transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        mask = _band(length, window, q.device) if window is not None and length > window else None
        attended = functional.scaled_dot_product_attention(
            one, two, three, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[rows] = attended.squeeze(0).transpose(0, 1)
        start += length
    return out


def _band(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
