"""Starts a decoder's chain of products: makes the residual stream and the rows that the first product reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def start_kernel(embedded, residual, norm, out, squares, H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    at = row.to(tl.int64) * H + columns
    value = tl.load(embedded + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual + at, value, mask=mask)
    tl.store(out + at, (value * tl.load(norm + columns, mask=mask, other=0.0)).to(out.dtype.element_ty), mask=mask)
    tl.store(squares + row, tl.sum(value * value, 0))


def start(
    embedded: Tensor,  # [T, H]
    norm: Tensor,  # [H]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual stream in float32, the rows times the norm's weight, and their sums of squares [T, 1]."""
    rows, width = embedded.shape
    residual = torch.empty((rows, width), dtype=torch.float32, device=embedded.device)
    out = torch.empty((rows, width), dtype=norm.dtype, device=embedded.device)
    squares = torch.empty((rows, 1), dtype=torch.float32, device=embedded.device)
    block = triton.next_power_of_2(width)
    start_kernel[(rows,)](
        embedded, residual, norm, out, squares, H=width, BLOCK=block, PARTS=1, num_warps=max(1, min(16, block // 256))
    )
    return residual, out, squares
