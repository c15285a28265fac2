"""Pointwise steps of the decoder, each one pass over memory: Triton on CUDA, torch elsewhere.

Letters: T rows (tokens), H width. Tensors are contiguous. Arithmetic is in float32, whatever the dtype. After
Liger-Kernel's RMS norm and SiLU kernels, one program per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


@triton.jit
def rms_norm_kernel(x, residual, weight, out, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    value = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
        # Norm the rounded sum, as the residual stream holds it.
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        tl.store(residual + row + columns, value.to(residual.dtype.element_ty), mask=mask)
    scale = tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    normed = value * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:
    """Normalize each row. Returns a new tensor [T, H] in the dtype of `weight`.

    Semantics: `y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight`.
    """
    if not x.is_cuda:
        return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(weight.dtype)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch_rms_norm(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H]; float32 keeps what many bf16 layers would round away
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:
    """Add `x` to `residual` in place, and normalize the sum. Returns a new tensor [T, H] in the dtype of `weight`.

    Semantics: `residual += x`, then `y = rms_norm(residual)`.
    """
    if not x.is_cuda:
        residual += x
        return rms_norm(residual, weight, eps)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch_rms_norm(x, residual, weight, out, eps, add=True)
    return out


def _launch_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, add: bool) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 256))
    rms_norm_kernel[(rows,)](x, residual, weight, out, eps, H=width, BLOCK=block, ADD=add, num_warps=warps)


@triton.jit
def silu_mul_kernel(gate_up, out, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    gate = tl.load(gate_up + row * 2 * H + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * H + H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


def silu_mul(
    gate_up: Tensor,  # [T, 2 H], gate first
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the gated activation of an MLP. Returns a new tensor [T, H], in `dtype` or the dtype of `gate_up`.

    Semantics: `y[t] = silu(gate[t]) * up[t]`.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        return (functional.silu(gate_up[:, :width]) * gate_up[:, width:]).to(dtype or gate_up.dtype)
    out = torch.empty((rows, width), dtype=dtype or gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, out, H=width, BLOCK=block, num_warps=4)
    return out
