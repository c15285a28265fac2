"""A decoder layer's products for batches of few rows, such as a step that makes one token a request.

One launch computes a projection, with the norm before it, the adapters' `B h`, and what follows: the activation, or the
addition to the residual stream. Launches are chained (programmatic dependent launch): a launch starts early, and
fetches its weights while it waits for the launch before. A row's result does not depend on the other rows. It depends
on the number of rows, rounded up to one of `BUCKETS`, and on whether the batch has no adapter, one, or several.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ranklet.kernels.launch import is_hopper, launch_fitted, precision_of
from ranklet.kernels.row_gemm_tiles import LEAST_WIDTH, MOST_SPLIT_ROWS, ThinTile, Tile, find
from ranklet.kernels.row_shrink import row_shrink
from ranklet.kernels.row_steps import ADDED, GATED, PLAIN
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.split_gemm import split_kernel
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.thin_gemm import thin_kernel

_MOST_SPLIT = 4


class NormedRows(NamedTuple):
    """Rows before a product, which completes their RMS norm.

    Attributes:
        x: [T, K] residual * norm weight, in 16 bits.
        squares: float32 [T, parts]: sums of squares of parts of the residual's rows. None if `x` needs no norm.
    """

    x: Tensor
    squares: Tensor | None = None
    eps: float = 0.0


class NextNorm(NamedTuple):
    weight: Tensor  # [N]
    eps: float


class RowLora(NamedTuple):
    """The adapters of a batch, for one projection."""

    stack: LinearStack
    tiles: RowTiles  # padded, on the device
    terms: Tensor | None = None  # float32 [S, 2, N]


class Workspace:
    """Device memory that the programs of one product with splits share. Only one stream may use it.

    Args:
        width: the largest number of columns of a product that is added to the residual stream.
    """

    def __init__(self, device: torch.device, width: int) -> None:
        self.arrivals = torch.zeros(MOST_SPLIT_ROWS * width // 256, dtype=torch.int32, device=device)
        self.parts = torch.empty(_MOST_SPLIT * MOST_SPLIT_ROWS * width, dtype=torch.float32, device=device)


def supports(weight: Tensor, widths: Iterable[int]) -> bool:
    """Return whether the weights are supported: bfloat16, on Hopper, and of suitable widths.

    In float16, `residual * norm weight` could overflow.

    Args:
        widths: input widths of the projections, and columns of their slices.
    """
    fits = not any(width % LEAST_WIDTH for width in widths)
    return is_hopper(weight.device) and weight.dtype == torch.bfloat16 and fits


def plain(
    rows: NormedRows,
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    lora: RowLora | None,
    workspace: Workspace,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Compute a projection. Returns a new tensor [T, N] in `dtype`, or the dtype of the rows."""
    out = torch.empty((rows.x.shape[0], weight.shape[0]), dtype=dtype or rows.x.dtype, device=rows.x.device)
    _launch(_Call(rows, weight, bias, lora, workspace, PLAIN, out), tile)
    return out


def gated(
    rows: NormedRows,
    weight: Tensor,  # [2 N, K], gate first
    bias: Tensor | None,  # [2 N]
    lora: RowLora | None,
    workspace: Workspace,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Compute the gated activation of an MLP. Returns a new tensor [T, N].

    Semantics: `y[t] = silu(gate[t]) * up[t]`, where `(gate[t], up[t]) = plain(rows)[t]`.
    """
    out = torch.empty((rows.x.shape[0], weight.shape[0] // 2), dtype=rows.x.dtype, device=rows.x.device)
    _launch(_Call(rows, weight, bias, lora, workspace, GATED, out), tile)
    return out


def added(
    rows: NormedRows,
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    lora: RowLora | None,
    workspace: Workspace,
    residual: Tensor,  # float32 [T, N]
    norm: NextNorm | None,
    *,
    tile: Tile | None = None,
) -> NormedRows:
    """Add a projection to the residual stream in place. Returns the rows that the products after the next norm read.

    Args:
        norm: None if no norm follows. Then the returned rows have no contents.
    """
    found, count, width = tile or _tile(rows, weight, lora, ADDED), *residual.shape
    squares = torch.empty((count, width // found.block_n), dtype=torch.float32, device=residual.device)
    out = torch.empty((count, width), dtype=rows.x.dtype, device=residual.device)
    _launch(_Call(rows, weight, bias, lora, workspace, ADDED, out, residual, norm, squares), found)
    return NormedRows(out, squares, norm.eps if norm else 0.0)


class _Call(NamedTuple):
    rows: NormedRows
    weight: Tensor
    bias: Tensor | None
    lora: RowLora | None
    workspace: Workspace
    kind: int
    out: Tensor
    residual: Tensor | None = None
    norm: NextNorm | None = None
    squares: Tensor | None = None


def _launch(call: _Call, tile: Tile | None) -> None:
    rows, weight, bias, lora, workspace, kind, out, residual, norm, out_squares = call
    x, (count, wide) = rows.x, rows.x.shape
    tile = tile or _tile(rows, weight, lora, kind)
    width = weight.shape[0] // 2 if kind == GATED else weight.shape[0]
    chained = is_hopper(x.device)
    own = isinstance(tile, ThinTile) and tile.own and lora is not None and len(lora.tiles.runs) == 1
    # Absent tensors are replaced by any other tensor, which the kernel does not read.
    h, a, b, scalings, runs, rank, terms = x, x, x, x, x, 16, None
    slices: tuple[int, ...] = (width, width)
    if lora is not None:
        assert lora.tiles.on_device is not None
        stack, runs, terms = lora.stack, lora.tiles.on_device[1], lora.terms
        a, b, scalings, rank, slices = stack.a, stack.b, stack.scalings, stack.rank, (*stack.widths, width)
        h = x if own else row_shrink(x, stack, lora.tiles, chained=chained)
    adapters = 1 if lora is None else triton.next_power_of_2(len(lora.tiles.runs))
    in_parts = 0 if rows.squares is None else rows.squares.shape[1]
    squares, next_squares = (x if found is None else found for found in (rows.squares, out_squares))
    common = {
        "K": wide, "N": width, "R": rank, "BLOCK_R": triton.next_power_of_2(rank), "W0": slices[0], "W1": slices[1],
        "IN_PARTS": in_parts, "IN_BLOCK": triton.next_power_of_2(max(in_parts, 1)),
        "OUT_PARTS": 0 if out_squares is None else out_squares.shape[1],
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "KIND": kind, "NEXT": norm is not None, "BIAS": bias is not None, "LORA": lora is not None,
        "RUNS": max(1, min(adapters, tile.run_ranks // triton.next_power_of_2(rank))), "ADAPTERS": adapters,
        "PRECISION": precision_of(x), "CHAINED": chained, "TERMS": terms is not None,
        "num_warps": tile.warps, "launch_pdl": chained,
    }  # fmt: skip
    variant = (tile, own, *common.values())
    after = (out, x if residual is None else residual, x if norm is None else norm.weight, next_squares)
    bias = weight if bias is None else bias
    strides = (h.stride(0), b.stride(0), 0 if terms is None else terms.stride(0))
    terms = x if terms is None else terms
    row_blocks = triton.cdiv(count, tile.block_m)
    if isinstance(tile, ThinTile):
        thin = tile

        def launch_thin(stages: int) -> None:
            thin_kernel[(width // thin.block_n, row_blocks)](
                x, squares, weight, bias, a, h, b, runs, scalings, terms, *after, count, rows.eps, x.stride(0),
                scalings.stride(0), a.stride(0), *strides, PARTS=thin.warps, OWN=own, EARLY=thin.early,
                STAGES=stages, num_stages=stages, **common,
            )  # fmt: skip

        launch_fitted(launch_thin, tile.stages, variant)
        return
    split = tile
    assert split.split == 1 or count <= MOST_SPLIT_ROWS, "the workspace has no space for more parts"
    x_tma = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
    w_tma = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])

    def launch_split(stages: int) -> None:
        split_kernel[(width // split.block_n * row_blocks * split.split,)](
            x_tma, w_tma, squares, bias, h, b, runs, terms, *after, workspace.parts, workspace.arrivals, count,
            row_blocks, rows.eps, *strides, SPLIT=split.split, STAGES=stages, num_stages=stages, **common,
        )  # fmt: skip

    launch_fitted(launch_split, tile.stages, variant)


def _tile(rows: NormedRows, weight: Tensor, lora: RowLora | None, kind: int) -> Tile:
    width = weight.shape[0] // 2 if kind == GATED else weight.shape[0]
    widths = lora.stack.widths if lora is not None and kind != GATED else (width,)
    rank = None if lora is None else lora.stack.rank
    count, wide = rows.x.shape
    return find(kind, count, wide, widths, rows.x.element_size(), rank)
