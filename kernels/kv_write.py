"""Stores the keys and values of packed tokens in pages.

The rotation kernel of `rotary.py` stores keys and values itself. `write_kv` is for products that rotate their output.

Letters: T tokens of the batch, Q query heads, G key heads, D head width.
"""

from dataclasses import dataclass
from typing import Self

import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.paged_spans import LayerPages


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Where the keys and values of packed tokens are stored."""

    slots: Tensor  # int32 [T]: page * page tokens + offset in the page; -1: not stored
    pages: LayerPages

    def rows(self, begin: int, end: int | None = None) -> Self:
        return type(self)(self.slots[begin:end], self.pages)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def kv_write_kernel(
    qkv, keys, values, slots, row_stride, page_stride,
    Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, BLOCK_HEADS)[:, None]  # keys, then values
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < 2 * G) & (d < D)
    state = tl.load(qkv + token.to(tl.int64) * row_stride + (Q + heads) * D + d, mask=mask)
    state = state.to(keys.dtype.element_ty)
    at = slot // PAGE * page_stride + (heads % G * PAGE + slot % PAGE) * D + d
    tl.store(keys + at, state, mask=mask & (heads < G))
    tl.store(values + at, state, mask=mask & (heads >= G))


def write_kv(
    qkv: Tensor,  # [T, (Q + 2 G) * D], after normalization and rotation; rows contiguous
    slots: Tensor,  # int32 [T], as in `KvWrite`
    pages: LayerPages,
    heads: tuple[int, int],
) -> None:
    """Store the keys and values of each token whose slot is not -1.

    Semantics: `keys[slots[t] // page, g, slots[t] % page] = k[t, g]`; values likewise.

    Args:
        heads: (Q, G).
    """
    if qkv.is_cuda:
        write_kv_triton(qkv, slots, pages, heads)
    else:
        write_kv_torch(qkv, slots, pages, heads)


def write_kv_triton(qkv: Tensor, slots: Tensor, pages: LayerPages, heads: tuple[int, int]) -> None:
    if not len(qkv):
        return
    page, width = pages.keys.shape[2:]
    kv_write_kernel[(len(qkv),)](
        qkv, *pages, slots, qkv.stride(0), pages.keys.stride(0), Q=heads[0], G=heads[1], D=width, PAGE=page,
        BLOCK_HEADS=triton.next_power_of_2(2 * heads[1]), BLOCK_D=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def write_kv_torch(qkv: Tensor, slots: Tensor, pages: LayerPages, heads: tuple[int, int]) -> None:
    page, width = pages.keys.shape[2:]
    kept = slots >= 0
    own = slots[kept].long()
    states = qkv[kept, heads[0] * width :].view(len(own), 2, heads[1], width)
    for side, part in zip(pages, states.unbind(1), strict=True):
        side[own // page, :, own % page] = part.to(side.dtype)
