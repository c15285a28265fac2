"""Causal attention inside each request of a packed batch, behind one interface.

Letters: T tokens, Q query heads, G key heads, D head width, B requests.
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
    """Where each request of a packed batch begins and ends."""

    lengths: tuple[int, ...]
    offsets: Tensor  # int32 [B + 1] on the device: the running sum of lengths, from 0
    longest: int  # length, or more
    cudnn: CudnnSpans | None = None  # the places for cuDNN, where it is the faster


def reads_lengths_on_device(device: torch.device, dtype: torch.dtype, windows: Sequence[int | None]) -> bool:
    """Whether attention launches the same for other lengths, which it reads on the device."""
    slides = any(window is not None for window in windows)
    return device.type == "cuda" and dtype in _HALVES and (not slides or "window_size" in _CAUSAL)


def attend(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None) -> Tensor:
    """Grouped-query causal attention; no token sees another request.

    Args:
        qkv: [T, (Q + 2 G) * D], already normed and rotated.
        spans: the requests' places among the T tokens.
        heads: (Q, G).
        window: how many tokens back a token sees, itself included; None for all.

    Returns:
        [T, Q * D].
    """
    tokens, (queries, keys) = qkv.shape[0], heads
    q, k, v = qkv.view(tokens, queries + 2 * keys, head_dim).split((queries, keys, keys), dim=1)
    if window is not None and window >= spans.longest:
        window = None
    if spans.cudnn is not None and window is None:
        out = cudnn_attention.attend(qkv, spans.cudnn, spans.longest, heads, head_dim)
        if out is not None:
            return out
    if qkv.is_cuda and qkv.dtype in _HALVES:
        return _varlen(q, k, v, spans, window).reshape(tokens, queries * head_dim)
    return _by_request(q, k, v, spans.lengths, window).reshape(tokens, queries * head_dim)


def attend_last(qkv: Tensor, spans: Spans, heads: tuple[int, int], head_dim: int, window: int | None) -> Tensor:
    """`attend` for the last token of each request alone: [B, Q * D]."""
    tokens, (queries, keys), last = qkv.shape[0], heads, spans.offsets[1:] - 1
    if window is not None and window < spans.longest:
        return attend(qkv, spans, heads, head_dim, window)[last]
    q, k, v = qkv.view(tokens, queries + 2 * keys, head_dim).split((queries, keys, keys), dim=1)
    if qkv.is_cuda and qkv.dtype in _HALVES:
        one_each = torch.arange(len(last) + 1, dtype=torch.int32, device=qkv.device)
        out = varlen_attn(q[last], k, v, one_each, spans.offsets, 1, spans.longest, **_WHOLE)
        assert isinstance(out, Tensor)
    else:
        grouped, by_request = queries != keys, ((part.transpose(0, 1).split(spans.lengths, 1)) for part in (k, v))
        requests = zip(q[last].unsqueeze(2), *by_request, strict=True)
        attended = [functional.scaled_dot_product_attention(a, b, c, enable_gqa=grouped) for a, b, c in requests]
        out = torch.stack(attended)
    return out.reshape(len(last), queries * head_dim)


def _varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None) -> Tensor:
    options = dict(_CAUSAL)
    if "window_size" in options:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None:
        return _by_request(q, k, v, spans.lengths, window)
    longest = spans.longest
    out = varlen_attn(q, k, v, spans.offsets, spans.offsets, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


def _varlen_options(*, causal: bool) -> dict[str, Any]:
    """How this torch spells a grouped-query call: 2.11 and later differ in their keywords."""
    known = inspect.signature(varlen_attn).parameters
    seen: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    )
    return seen | ({"enable_gqa": True} if "enable_gqa" in known else {})


_HALVES = (torch.bfloat16, torch.float16)  # what torch's varlen kernel takes
_CAUSAL, _WHOLE = _varlen_options(causal=True), _varlen_options(causal=False)


def _by_request(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    out = torch.empty_like(q)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        one, two, three = (part[rows].transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        banded = window is not None and length > window
        mask = _band(length, window, q.device) if banded and window is not None else None
        attended = functional.scaled_dot_product_attention(
            one, two, three, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[rows] = attended.squeeze(0).transpose(0, 1)
        start += length
    return out


def _band(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < window)
