"""Attention over keys and values in pages with torch, one span after the other.

Letters: Q query heads, G key heads, D head width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels.paged_spans import LayerPages, PagedSpans


def decode_torch(
    qkv: Tensor, spans: PagedSpans, pages: LayerPages, heads: tuple[int, int], window: int | None, out: Tensor
) -> None:
    """Compute `decode` with torch, one span after the other."""
    for row, length, table in zip(spans.rows.tolist(), spans.lengths.tolist(), spans.table, strict=True):
        if length:
            attend_torch(qkv, slice(row, row + 1), length, table, pages, heads, window, out)


def attend_torch(
    qkv: Tensor, rows: slice, length: int, table: Tensor, pages: LayerPages, heads: tuple[int, int],
    window: int | None, out: Tensor,
) -> None:  # fmt: skip
    """Compute causal attention of one span in float32: packed rows `rows` are its last positions. Overwrites `out`."""
    queries, width = heads[0], pages.keys.shape[3]
    own = table[: -(-length // pages.keys.shape[2])].long()
    k, v = (part[own].transpose(0, 1).flatten(1, 2)[None, :, :length].float() for part in pages)
    q = qkv[rows, : queries * width].float().view(-1, queries, width).transpose(0, 1)[None]
    position = torch.arange(length, device=qkv.device)
    distance = position[length - q.shape[2] :, None] - position[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads[0] != heads[1])
    out[rows] = attended[0].transpose(0, 1).flatten(1).to(out.dtype)
