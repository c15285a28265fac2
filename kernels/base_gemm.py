"""The base model's projections without LoRA.

Letters: T rows (tokens), K input width, N output width.
"""

import torch
from torch import Tensor

from ranklet.kernels import fused_gemm
from ranklet.kernels.rotary import Rotary

_WIDENED_ROWS = 8192  # with more, twice the bytes between two steps are too many


def base(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    rotary: Rotary | None = None,
    *,
    out: Tensor | None = None,  # [T, N]
) -> Tensor:
    """Compute `W x[t] + bias`, then `rotary` if given. Returns `out`, or a new tensor [T, N]."""
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    if rotary and fused_gemm.can_rotate_base(x, weight, rotary):
        fused_gemm.rotated(x, weight, bias, out, rotary)
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
    """Return whether a product stays float32 for the step that follows it, instead of being rounded twice.

    Large batches use products that include the next step and so round once. Small batches must round as often, or a
    prompt would get another vector alone than among many: after 28 layers, with a cosine down to 0.9998.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] <= _WIDENED_ROWS


def widened(
    x: Tensor,  # [T, K], 16 bits on CUDA
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """Compute `W x[t] + bias` in float32 [T, N]."""
    wide = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return wide if bias is None else wide.add_(bias)
