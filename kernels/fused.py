"""Pointwise steps of the decoder, each one pass over memory: Triton on CUDA, torch elsewhere.

Letters: T rows, H width, D head width, Q query heads, G key heads. Arithmetic is float32 inside, whatever the dtype.
The RMS norm and SiLU kernels follow Liger-Kernel's one-program-per-row form.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


@triton.jit
def _rms_norm_kernel(x, residual, weight, out, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    value = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
        # The norm sees what the residual stream holds, its rounding included.
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        tl.store(residual + row + columns, value.to(residual.dtype.element_ty), mask=mask)
    scale = tl.rsqrt(tl.sum(value * value, 0) / H + eps)
    normed = value * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: `x / sqrt(mean(x^2) + eps) * weight`, by row. x [T, H], weight [H] -> [T, H] in weight's dtype."""
    if not x.is_cuda:
        return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(weight.dtype)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _launch_rms_norm(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: `residual += x` in place, then its RMS norm.

    Args:
        x: [T, H].
        residual: [T, H]; float32 keeps what many bf16 layers would round away.
        weight: [H].

    Returns:
        [T, H] in weight's dtype.
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
    _rms_norm_kernel[(rows,)](x, residual, weight, out, eps, H=width, BLOCK=block, ADD=add, num_warps=warps)


@triton.jit
def _qk_rope_kernel(
    qkv, q_weight, k_weight, cos, sin, positions, eps, row_stride,
    Q: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    position = tl.load(positions + token).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < HEADS) & (columns < HALF)
    first = qkv + token.to(tl.int64) * row_stride + heads * (2 * HALF) + columns
    low = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
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
        low = low * scale * weight_low.to(tl.float32)
        high = high * scale * weight_high.to(tl.float32)
    c = tl.load(cos + position * HALF + columns, mask=columns < HALF, other=0.0)
    s = tl.load(sin + position * HALF + columns, mask=columns < HALF, other=0.0)
    tl.store(first, (low * c - high * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(first + HALF, (high * c + low * s).to(qkv.dtype.element_ty), mask=mask)


def qk_norm_rope_(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    query_heads: int,
    key_heads: int,
    eps: float,
) -> None:
    """In place on the query and key heads of a packed projection: RMS norm by head (if `norms`), then rotation.

    Semantics: with halves (l, h) of each head, `l' = l cos - h sin`, `h' = h cos + l sin`.

    Args:
        qkv: [T, (Q + 2 G) * D], rows contiguous; value heads are left alone.
        norms: weights of the query and the key norm, each [D]; None for models without them.
        cos, sin: float32 [positions known, D / 2].
        positions: integers [T].
    """
    half = cos.shape[1]
    heads = query_heads + key_heads
    if not qkv.is_cuda:
        _qk_norm_rope_torch(qkv, norms, cos[positions], sin[positions], query_heads, heads, eps)
        return
    if qkv.shape[0] == 0:
        return
    q_weight, k_weight = norms or (cos, cos)
    _qk_rope_kernel[(qkv.shape[0],)](
        qkv, q_weight, k_weight, cos, sin, positions, eps, qkv.stride(0),
        Q=query_heads, HEADS=heads, HALF=half,
        BLOCK_HEADS=triton.next_power_of_2(heads), BLOCK_HALF=triton.next_power_of_2(half), NORM=norms is not None,
        num_warps=4,
    )  # fmt: skip


def _qk_norm_rope_torch(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    heads: int,
    eps: float,
) -> None:
    half = cos.shape[1]
    view = qkv[:, : heads * 2 * half].view(-1, heads, 2 * half)
    value = view.float()
    if norms is not None:
        weights = torch.stack([norms[0]] * query_heads + [norms[1]] * (heads - query_heads)).float()
        value = functional.rms_norm(value, (2 * half,), None, eps) * weights
    low, high = value[..., :half], value[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    view.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))


@triton.jit
def _silu_mul_kernel(gate_up, out, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    gate = tl.load(gate_up + row * 2 * H + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * H + H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: `silu(gate) * up`. gate_up [T, 2 H], gate first -> [T, H]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        return functional.silu(gate_up[:, :width]) * gate_up[:, width:]
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, out, H=width, BLOCK=block, num_warps=4)
    return out
