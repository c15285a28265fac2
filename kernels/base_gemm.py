"""The base model's projections without LoRA.

Letters: T rows (tokens), K input width, N output width.
"""

import torch
from torch import Tensor

from ranklet.kernels import fused_gemm
from ranklet.kernels.rotary import Rotary

_WIDENED_ROWS = 8192  # with more, the float32 product costs too much memory traffic


def base(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    rotary: Rotary | None = None,
    *,
    out: Tensor | None = None,  # [T, N]
) -> Tensor:
    """Compute a projection without LoRA, then `rotary` if given. Returns `out`, or a new tensor [T, N].

    Semantics: `y[t] = rotary(W x[t] + bias)`.
    """
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if rotary and fused_gemm.can_rotate_base(x, weight, rotary):
        fused_gemm.rotated(x, weight, bias, out, rotary)
        rotary.store(out)
    elif rotary and may_widen(x):
        rotary.write(widened(x, weight, bias), out)
    else:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        if rotary:
            rotary.apply_(out)
    return out


def may_widen(x: Tensor) -> bool:
    """Return whether a product is kept in float32 until the next step, so that both round only once.

    In large batches, one kernel computes the product and the next step, and rounds once. Small batches must round as
    often. Otherwise a prompt's vector would depend on the size of its batch: after 28 layers, down to a cosine of
    0.9998.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] <= _WIDENED_ROWS


def widened(
    x: Tensor,  # [T, K], 16 bits on CUDA
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """Compute a projection in float32. Returns a new tensor [T, N].

    Semantics: `y[t] = W x[t] + bias`.
    """
    wide = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return wide if bias is None else wide.add_(bias)
