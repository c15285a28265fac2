"""Normalizes and rotates query and key heads, between a decoder layer's first projection and attention.

The same launch stores keys and values in pages, for sequences whose later tokens attend to them.

Letters: T rows (tokens), D head width, Q query heads, G key heads. Arithmetic is in float32, whatever the dtype. Where
possible, `fused_gemm.py` does this within the projection, before its output is written to memory. After RoFormer's
rotary position embeddings (Su et al., 2021), which pair the halves of a head as in GPT-NeoX.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ranklet.kernels.kv_write import KvWrite, write_kv


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotary_kernel(
    qkv, out, q_weight, k_weight, cos, sin, positions, eps, row_stride,
    Q: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, NORM: tl.constexpr,
    keys=None, values=None, slots=None, page_stride=0, PAGE: tl.constexpr = 0,
):  # fmt: skip
    token = tl.program_id(0)
    position = tl.load(positions + token).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < HEADS) & (columns < HALF)
    at = token.to(tl.int64) * row_stride + heads * (2 * HALF) + columns
    low = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        is_query = heads < Q
        in_head = columns < HALF
        weight_low = tl.where(
            is_query, tl.load(q_weight + columns, mask=in_head), tl.load(k_weight + columns, mask=in_head)
        )
        weight_high = tl.where(
            is_query, tl.load(q_weight + HALF + columns, mask=in_head), tl.load(k_weight + HALF + columns, mask=in_head)
        )
        is_value = heads >= ROTATED
        low = tl.where(is_value, low, low * scale * weight_low.to(tl.float32))
        high = tl.where(is_value, high, high * scale * weight_high.to(tl.float32))
    c = tl.load(cos + position * HALF + columns, mask=columns < HALF, other=0.0)
    s = tl.load(sin + position * HALF + columns, mask=columns < HALF, other=0.0)
    c = tl.where(heads < ROTATED, c, 1.0)
    s = tl.where(heads < ROTATED, s, 0.0)
    rotated_low = (low * c - high * s).to(out.dtype.element_ty)
    rotated_high = (high * c + low * s).to(out.dtype.element_ty)
    tl.store(out + at, rotated_low, mask=mask)
    tl.store(out + at + HALF, rotated_high, mask=mask)
    if PAGE > 0:
        slot = tl.load(slots + token).to(tl.int64)
        G: tl.constexpr = ROTATED - Q
        head = tl.where(heads < ROTATED, heads - Q, heads - ROTATED)
        in_page = slot // PAGE * page_stride + (head * PAGE + slot % PAGE) * (2 * HALF) + columns
        is_key = mask & (slot >= 0) & (heads >= Q) & (heads < ROTATED)
        is_value = mask & (slot >= 0) & (heads >= ROTATED) & (heads < ROTATED + G)
        tl.store(keys + in_page, rotated_low.to(keys.dtype.element_ty), mask=is_key)
        tl.store(keys + in_page + HALF, rotated_high.to(keys.dtype.element_ty), mask=is_key)
        tl.store(values + in_page, rotated_low.to(values.dtype.element_ty), mask=is_value)
        tl.store(values + in_page + HALF, rotated_high.to(values.dtype.element_ty), mask=is_value)


@dataclass(frozen=True, slots=True)
class Rotary:
    """RMS norm of each head, if the model has it, then rotation by position.

    Semantics: with the halves (l, h) of each head, `l' = l cos - h sin`, `h' = h cos + l sin`.

    Attributes:
        norms: weights of the query norm and the key norm, [D] each; None for models without them.
        cos, sin: float32 [positions, D / 2].
        positions: integers [T].
        kv: where `apply_`, `write` and `store` put the rotated keys and the values; None to keep them only in `qkv`.
    """

    norms: tuple[Tensor, Tensor] | None
    cos: Tensor
    sin: Tensor
    positions: Tensor
    query_heads: int
    key_heads: int
    eps: float
    kv: KvWrite | None = None

    @property
    def half(self) -> int:
        return self.cos.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        return self.query_heads * 2 * self.half, self.key_heads * 2 * self.half

    def rows(self, begin: int, end: int | None = None) -> Self:
        kv = None if self.kv is None else self.kv.rows(begin, end)
        return replace(self, positions=self.positions[begin:end], kv=kv)

    def apply_(
        self,
        qkv: Tensor,  # [T, (Q + 2 G) * D], rows contiguous
    ) -> Tensor:
        """Normalize and rotate the query and key heads in place. Value heads are kept. Returns `qkv`."""
        if not qkv.is_cuda:
            _apply_torch(qkv, self)
            self.store(qkv)
        elif qkv.shape[0]:
            self._launch(qkv, qkv, self.query_heads + self.key_heads * (1 if self.kv is None else 2))
        return qkv

    def write(
        self,
        qkv: Tensor,  # [T, (Q + 2 G) * D], rows contiguous; overwritten on the CPU
        out: Tensor,  # [T, (Q + 2 G) * D], strides as in `qkv`, any dtype
    ) -> None:
        """Write normalized and rotated queries and keys to `out`, and copy the values. Rounds once."""
        if not qkv.is_cuda:
            out.copy_(self.apply_(qkv))
        elif qkv.shape[0]:
            self._launch(qkv, out, self.query_heads + 2 * self.key_heads)

    def store(
        self,
        qkv: Tensor,  # [T, (Q + 2 G) * D], rows contiguous
    ) -> None:
        """Store keys and values as `kv` says, if the product has rotated the keys already."""
        if self.kv is not None:
            write_kv(qkv, self.kv.slots, self.kv.pages, (self.query_heads, self.key_heads))

    def _launch(self, qkv: Tensor, out: Tensor, heads: int) -> None:
        assert qkv.stride() == out.stride()
        q_weight, k_weight = self.norms or (self.cos, self.cos)
        rotary_kernel[(qkv.shape[0],)](
            qkv, out, q_weight, k_weight, self.cos, self.sin, self.positions, self.eps, qkv.stride(0),
            Q=self.query_heads, ROTATED=self.query_heads + self.key_heads, HEADS=heads, HALF=self.half,
            BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_HALF=triton.next_power_of_2(self.half),
            NORM=self.norms is not None, **_pages_of(self.kv), num_warps=4,
        )  # fmt: skip


def _pages_of(kv: KvWrite | None) -> dict[str, Any]:
    if kv is None:
        return {}
    keys, values = kv.pages
    return {
        "keys": keys, "values": values, "slots": kv.slots, "page_stride": keys.stride(0), "PAGE": keys.shape[2],
    }  # fmt: skip


def _apply_torch(qkv: Tensor, rotary: Rotary) -> None:
    half, heads = rotary.half, rotary.query_heads + rotary.key_heads
    view = qkv[:, : heads * 2 * half].view(-1, heads, 2 * half)
    value = view.float()
    if rotary.norms is not None:
        queries, keys = rotary.norms
        weights = torch.stack([queries] * rotary.query_heads + [keys] * rotary.key_heads).float()
        value = functional.rms_norm(value, (2 * half,), None, rotary.eps) * weights
    low, high = value[..., :half], value[..., half:]
    cos, sin = rotary.cos[rotary.positions][:, None], rotary.sin[rotary.positions][:, None]
    view.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
