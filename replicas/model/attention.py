"""Causal attention within each sequence of a packed batch.

`attend` chooses the implementation: cuDNN if the spans have cuDNN's offsets, else torch's varlen kernel for 16-bit
tensors on a GPU, else a loop over the sequences.

Letters: T tokens, Q query heads, G key heads, D head width, B sequences.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.cudnn_attention import CudnnSpans


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each sequence of a packed batch begins and ends."""

    lengths: tuple[int, ...]  # tokens of each sequence
    offsets: Tensor  # int32 [B + 1] on the device: cumulative lengths, starting at 0
    longest: int  # upper bound on the lengths
    cudnn: CudnnSpans | None = None  # None if cuDNN is not used


def reads_lengths_on_device(device: torch.device, dtype: torch.dtype, windows: Sequence[int | None]) -> bool:
    """Whether attention kernels read the lengths from device memory, so that one CUDA graph serves other lengths."""
    slides = any(window is not None for window in windows)
    return device.type == "cuda" and dtype in _VARLEN_DTYPES and (not slides or "window_size" in _CAUSAL)


def attend(
    qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None, *, last: bool = False
) -> Tensor:
    """Compute grouped-query causal attention within each sequence.

    Args:
        qkv: [T, (Q + 2 G) * D], after normalization and rotation.
        heads: (Q, G).
        head_dim: D.
        window: number of tokens that each token attends to, itself included; None for no limit.
        last: compute only the last token of each sequence.

    Returns:
        [T, Q * D], or [B, Q * D] if `last`.
    """
    if window is not None and window >= spans.longest:
        window = None
    if last and window is None:
        return _attend_last(qkv, spans, heads, head_dim)
    out = _attend_all(qkv, spans, heads, head_dim, window)
    return out[spans.offsets[1:] - 1] if last else out


def _attend_all(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None) -> Tensor:
    if spans.cudnn is not None and window is None:
        out = cudnn_attention.attend(qkv, spans.cudnn, spans.longest, heads, head_dim)
        if out is not None:
            return out
    q, k, v = _split(qkv, heads, head_dim)
    if _takes_varlen(qkv) and (window is None or "window_size" in _CAUSAL):
        attended = _varlen(q, k, v, spans, window)
    else:
        attended = _by_sequence(q, k, v, spans.lengths, window)
    return attended.reshape(len(qkv), -1)


def _attend_last(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int) -> Tensor:
    q, k, v = _split(qkv, heads, head_dim)
    q = q[spans.offsets[1:] - 1]
    if _takes_varlen(qkv):
        query_offsets = torch.arange(len(q) + 1, dtype=torch.int32, device=qkv.device)
        out = varlen_attn(q, k, v, query_offsets, spans.offsets, 1, spans.longest, **_NOT_CAUSAL)
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
    options = dict(_CAUSAL)
    if "window_size" in options:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, spans.offsets, spans.offsets, spans.longest, spans.longest, **options)
    assert isinstance(out, Tensor)  # it returns a tuple only if auxiliary outputs are requested
    return out


def _varlen_options(*, causal: bool) -> dict[str, Any]:
    # torch 2.11 and later releases name the options of a grouped-query call differently.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_CAUSAL, _NOT_CAUSAL = _varlen_options(causal=True), _varlen_options(causal=False)


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
