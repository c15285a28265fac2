"""The MLP's first product and its activation in one kernel, which writes only `silu(gate) * up`.

The product is slower than cuBLAS's, but saves more time: gate and up are never written to memory.

Letters: T rows (tokens), K input width, N width of gate and of up. After Triton's persistent matmul tutorial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.fused_gemm import suits
from ranklet.kernels.launch import is_hopper, launch_fitted, processors_of
from ranklet.kernels.row_tiles import BLOCK_ROWS
from ranklet.kernels.tiles import FusedTile, TileKey, find_tile


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(
    x_tma, w_tma, y_tma, rows, N: tl.constexpr, K: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_M)
    columns_of_blocks: tl.constexpr = N // BLOCK_N
    per_group: tl.constexpr = GROUP * columns_of_blocks
    for block in tl.range(tl.program_id(0), row_blocks * columns_of_blocks, PROGRAMS):
        # Blocks of a group share rows of x and columns of W, which then come from the L2 cache.
        above = block // per_group * GROUP
        height = tl.minimum(row_blocks - above, GROUP)
        start = (above + block % per_group % height) * BLOCK_M
        first = block % per_group // height * BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            weight = tl.reshape(w_tma.load([0, first, k]), (2 * BLOCK_N, BLOCK_K))
            acc = tl.dot(x_tma.load([start, k]), weight.T, acc)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        y_tma.store([start, first], (gate * tl.sigmoid(gate) * up).to(y_tma.dtype))


def gated(
    x: Tensor,  # [T, K], 16 bits
    weight: Tensor,  # [2 N, K], gate first
) -> Tensor:
    """Compute the gated activation of an MLP. Returns a new tensor [T, N].

    Semantics: `y[t] = silu(Wg x[t]) * Wu x[t]`, rounded once. Requires `can_gate`.
    """
    rows, wide = x.shape
    width, tile, programs = weight.shape[0] // 2, _tile(x, weight), processors_of(x.device)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    pair = weight.view(2, width, wide)
    x_tma = TensorDescriptor.from_tensor(x, [BLOCK_ROWS, tile.block_k])
    w_tma = TensorDescriptor.from_tensor(pair, [2, tile.block_n, tile.block_k])
    y_tma = TensorDescriptor.from_tensor(y, [BLOCK_ROWS, tile.block_n])

    def launch(stages: int) -> None:
        gated_kernel[(min(programs, triton.cdiv(rows, BLOCK_ROWS) * (width // tile.block_n)),)](
            x_tma, w_tma, y_tma, rows, N=width, K=wide, PROGRAMS=programs, BLOCK_M=BLOCK_ROWS, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, GROUP=tile.group, STAGES=stages, num_warps=tile.warps, num_stages=stages,
        )  # fmt: skip

    launch_fitted(launch, tile.stages, (gated_kernel, tile))
    return y


def can_gate(x: Tensor, weight: Tensor) -> bool:
    """Return whether `gated` supports these tensors: Hopper or later, 16 bits, many rows, and whole blocks."""
    if not is_hopper(x.device):
        return False
    tile = _tile(x, weight)
    return suits(x, x.shape[0], tile) and weight.shape[0] // 2 % tile.block_n == 0 and weight.is_contiguous()


def _tile(x: Tensor, weight: Tensor) -> FusedTile:
    return find_tile(x.device, FusedTile, TileKey("gated", x.shape[1], (weight.shape[0],), 0, BLOCK_ROWS, x.shape[0]))
