"""Cuts the rows of a batch into tiles of one adapter each, as the kernels read them.

The fused product reads blocks of `BLOCK_ROWS` rows instead, which may belong to several adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.powers import power_of_four

SHORT_ROWS = 32  # adapters with up to this many rows are cut into short tiles, the others into tall ones
SHORT_HEIGHTS = (16, 32)
TALL_HEIGHTS = (64, 128)
HEIGHTS = (*SHORT_HEIGHTS, *TALL_HEIGHTS)
BLOCK_ROWS = 128
MANY_ROWS = 256  # batches with more rows use no kernels for short batches


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Adjacent segments cut into tiles of one height. One launch works on one `RowTiles`.

    Attributes:
        height: the largest number of rows of a tile.
        table: [tiles, 3]: first row, end row, slot; an empty tile is (0, 0, 0).
        runs: [segments, 3]: first row, end row, slot.
        blocks: [blocks, 2]: first and end segment with rows in the block, as indices into `runs`.
        rows: first and end row of the blocks.
        on_device: table, runs and blocks in device memory.
    """

    height: int
    table: NDArray[np.int32]
    runs: NDArray[np.int32]
    blocks: NDArray[np.int32]
    rows: tuple[int, int]
    on_device: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        return self.table, self.runs, self.blocks

    def to(self, device: torch.device) -> Self:
        table, runs, blocks = (torch.from_numpy(array).to(device) for array in self.arrays)
        return replace(self, on_device=(table, runs, blocks))


def cut_runs(runs: NDArray[np.int32]) -> tuple[RowTiles, ...]:
    """Cut long segments, which come first, into tall tiles, and the others into short tiles.

    The height of each kind is the smallest that covers its median segment. A kind without segments is left out.

    Args:
        runs: [segments, 3]: first row, end row, slot.
    """
    short = runs[:, 1] - runs[:, 0] <= SHORT_ROWS
    tall = int(short.argmax()) if short.any() else len(runs)
    kinds = ((runs[:tall], TALL_HEIGHTS), (runs[tall:], SHORT_HEIGHTS))
    return tuple(_cut(found, heights) for found, heights in kinds if len(found))


def cut_padded(runs: NDArray[np.int32], rows: int) -> tuple[RowTiles, ...]:
    """Cut segments so that a CUDA graph can be reused for other batches with the same number of rows.

    Height and array lengths depend only on the number of rows and on the number of adapters, rounded up by
    `padded_runs`. The blocks cover all rows of the batch, also those without an adapter.

    Args:
        runs: [segments, 3]: first row, end row, slot.
        rows: of the whole batch.
    """
    if not len(runs):
        return ()
    adapters = padded_runs(len(runs), rows)
    height = next((height for height in HEIGHTS if rows <= height * adapters), HEIGHTS[-1])
    most = rows // height + adapters  # each adapter has at most one tile that is not full
    table, padded = _fill(_table(runs, height), most), _fill(runs, adapters)
    return (RowTiles(height, table, padded, _blocks(runs, (0, rows)), (0, rows)),)


def padded_runs(adapters: int, rows: int) -> int:
    """Round a number of adapters up: to a power of four, of which some are left out where the next costs the same.

    Kernels for long batches do not differ for one adapter. Those for short ones work on 16 ranks of eight adapters at
    a time, so 16 and 64 differ in empty tiles only.
    """
    rounded = power_of_four(adapters)
    if rows > MANY_ROWS:
        return max(rounded, 4)
    return 64 if rounded == 16 < rows else rounded


def _cut(runs: NDArray[np.int32], heights: Sequence[int]) -> RowTiles:
    rows = runs[:, 1] - runs[:, 0]
    typical = np.sort(rows)[len(rows) // 2]
    height = next((height for height in heights if typical <= height), heights[-1])
    span = (int(runs[0, 0]), int(runs[-1, 1]))
    return RowTiles(height, _table(runs, height), runs, _blocks(runs, span), span)


def _table(runs: NDArray[np.int32], height: int) -> NDArray[np.int32]:
    counts = -(-(runs[:, 1] - runs[:, 0]) // height)
    ends = counts.cumsum()
    tiles = int(ends[-1])
    if tiles == len(runs):  # each segment is one tile
        return runs
    table = runs.repeat(counts, axis=0)
    table[:, 0] += (np.arange(tiles) - (ends - counts).repeat(counts)) * height
    np.minimum(table[:, 1], table[:, 0] + height, out=table[:, 1])
    return table


def _fill(table: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    return np.concatenate((table, np.zeros((length - len(table), 3), dtype=np.int32)))


def _blocks(runs: NDArray[np.int32], rows: tuple[int, int]) -> NDArray[np.int32]:
    starts = np.arange(*rows, BLOCK_ROWS, dtype=np.int32)
    blocks = np.empty((len(starts), 2), dtype=np.int32)
    blocks[:, 0] = runs[:, 1].searchsorted(starts, "right")
    blocks[:, 1] = runs[:, 0].searchsorted(starts + (BLOCK_ROWS - 1), "right")
    return blocks
