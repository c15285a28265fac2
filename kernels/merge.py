"""Merges several adapters with the base weight in one launch, for the `merged` backend.

Letters as in `stack.py`. After the merged weights of the LoRA paper (Hu et al., 2021).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import precision_of, programs_of, slice_of, widths_of
from ranklet.kernels.stack import LinearStack

AT_ONCE = 4  # adapters of one launch: their slots are passed as plain arguments, not copied to the device

_BLOCK_N, _BLOCK_K, _WARPS = 64, 128, 4  # on an H200 the fastest of six for all of Qwen3-0.6B's projections


@triton.jit(do_not_specialize=["slot0", "slot1", "slot2", "slot3"], do_not_specialize_on_alignment=["terms"])
def merge_kernel(
    w, a, b, out, ranks, scalings, terms, slot0, slot1, slot2, slot3, meta_stride, K, w_stride, a_slot_stride,
    b_slot_stride, out_stride, terms_stride,
    R: tl.constexpr, SLICES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(2)
    slot = tl.where(which == 0, slot0, tl.where(which == 1, slot1, tl.where(which == 2, slot2, slot3)))
    piece, first, width, program = slice_of(tl.program_id(1), SLICES, W0, W1, W2, BLOCK_N)
    rank = tl.load(ranks + slot * meta_stride + piece)
    scaling = tl.load(scalings + slot * meta_stride + piece)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    inside = (n < width)[:, None] & (k < K)[None, :]
    n += first
    base = tl.load(w + n.to(tl.int64)[:, None] * w_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    a_at = a + slot.to(tl.int64) * a_slot_stride + (piece * R + r)[:, None] * K + k[None, :]
    b_at = b + slot.to(tl.int64) * b_slot_stride + n[:, None] * R + r[None, :]
    lora_a = tl.load(a_at, mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
    lora_b = tl.load(b_at, mask=(n < first + width)[:, None] & (r < rank)[None, :], other=0.0)
    merged = base + scaling * tl.dot(lora_b, lora_a, input_precision=PRECISION)
    if TERMS:
        gain = tl.load(terms + slot.to(tl.int64) * terms_stride + n, mask=n < first + width, other=0.0)
        merged *= gain[:, None]
    out_at = out + which.to(tl.int64) * out_stride + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=inside)


def merge(
    out: Tensor,  # [len(slots) or more, N, K], contiguous
    weight: Tensor,  # [N, K], rows contiguous
    stack: LinearStack,
    slots: Sequence[int],
) -> None:
    """Merge adapters into copies of a base weight. Overwrites the first `len(slots)` matrices of `out`.

    Semantics: `out[i] = gain * (W + s B A)` of `slots[i]`, in float32 and rounded once. Slices that the adapter does
    not change are copies of W.

    Args:
        slots: at most `AT_ONCE`.
    """
    wide = weight.shape[1]
    terms = stack.terms if any(stack.meta[slot].terms for slot in slots) else None
    merge_kernel[(triton.cdiv(wide, _BLOCK_K), programs_of(stack, _BLOCK_N), len(slots))](
        weight, stack.a, stack.b, out, stack.ranks, stack.scalings, weight if terms is None else terms,
        *(*slots, 0, 0, 0)[:AT_ONCE], stack.ranks.stride(0), wide, weight.stride(0), stack.a.stride(0),
        stack.b.stride(0), out.stride(0), 0 if terms is None else terms.stride(0),
        R=stack.rank, **widths_of(stack), BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        BLOCK_R=triton.next_power_of_2(stack.rank), PRECISION=precision_of(weight), TERMS=terms is not None,
        num_warps=_WARPS,
    )  # fmt: skip
