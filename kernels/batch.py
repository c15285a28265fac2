"""Which rows of a batch belong to which adapter, and how they are cut into tiles.

Letters: T rows (tokens) of a batch, S slots of the adapter pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHORT_ROWS = 32  # adapters with no more rows than this are cut into short tiles, the others into tall ones
SHORT_HEIGHTS = (16, 32)
TALL_HEIGHTS = (64, 128)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of rows [start, stop) that all use the adapter in `slot`."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Tiles:
    """Segments cut into runs of at most `height` rows; a tile never spans two adapters."""

    height: int
    table: NDArray[np.int32]  # [tiles, 3]: first row, end row, slot; an empty tile is (0, 0, 0)
    device: Tensor | None = None  # the same, where the kernels read it


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The LoRA side of one batch: segments end to end from row 0, at most one per slot.

    `plan` puts those of more than `SHORT_ROWS` rows first. The rows behind the last segment use the base model alone
    and cost nothing.

    Raises:
        ValueError: the segments leave a gap, overlap, or end beyond the rows.
    """

    segments: tuple[Segment, ...]
    rows: int
    backend: str = "none"
    tiles: tuple[Tiles, ...] = field(default=(), compare=False)  # filled in for backends that need them

    def __post_init__(self) -> None:
        ends = [0, *(segment.stop for segment in self.segments)]
        starts = [*(segment.start for segment in self.segments), min(self.rows, ends[-1])]
        if starts != ends:
            raise ValueError(f"segments: expected runs end to end within {self.rows} rows, got {self.segments}")

    @property
    def adapters(self) -> int:
        return len(self.segments)

    @property
    def lora_rows(self) -> int:
        """How many rows, from 0, have an adapter."""
        return self.segments[-1].stop if self.segments else 0

    def placed(self, device: torch.device) -> Self:
        """The batch cut into tiles, with their tables on a device (engines send them along with the token ids)."""
        made = (replace(tiles, device=torch.from_numpy(tiles.table).to(device)) for tiles in cut(self))
        return replace(self, tiles=tuple(made))


def plan(lengths: Sequence[int], slots: Sequence[int | None]) -> tuple[list[int], LoraBatch]:
    """Order the requests of a batch by adapter, so that each adapter's rows stand together.

    It sorts requests, never rows: O(n log n) in requests, whatever their lengths.

    Args:
        lengths: rows of each request.
        slots: the pool slot of each request's adapter, None for the base model.

    Returns:
        The order to lay the requests out in (adapters with many rows first, base-only requests last, arrival order kept
        inside an adapter), and the batch whose segments fit that layout.
    """
    rows: dict[int | None, int] = {}
    for length, slot in zip(lengths, slots, strict=True):
        rows[slot] = rows.get(slot, 0) + length
    rank = {slot: (slot is None, rows[slot] <= SHORT_ROWS, slot or 0) for slot in rows}
    order = sorted(range(len(lengths)), key=lambda i: rank[slots[i]])
    segments = []
    start = 0
    for slot, _ in groupby(order, key=lambda i: slots[i]):
        stop = start + rows[slot]
        if slot is not None and stop > start:
            segments.append(Segment(slot, start, stop))
        start = stop
    return order, LoraBatch(tuple(segments), rows=start)


def cut(batch: LoraBatch, capacity: int | None = None) -> tuple[Tiles, ...]:
    """The batch's segments as tiles: tall ones for the long segments that stand first, short ones for the rest.

    Kinds without a segment are left out. The height of a kind is the smallest that covers its typical segment: a launch
    has one height.

    Args:
        capacity: pad each kind with empty tiles up to this many, so that a CUDA graph can replay other batches.
    """
    tall = list(takewhile(lambda segment: segment.rows > SHORT_ROWS, batch.segments))
    short = batch.segments[len(tall) :]
    kinds = ((tall, TALL_HEIGHTS), (short, SHORT_HEIGHTS))
    return tuple(_cut(segments, heights, capacity) for segments, heights in kinds if segments)


def _cut(segments: Sequence[Segment], heights: Sequence[int], capacity: int | None) -> Tiles:
    runs = np.array([(segment.start, segment.stop, segment.slot) for segment in segments], dtype=np.int32)
    rows = runs[:, 1] - runs[:, 0]
    typical = float(np.median(rows))
    height = next((height for height in heights if typical <= height), heights[-1])
    counts = -(-rows // height)
    table = np.zeros((max(int(counts.sum()), capacity or 0), 3), dtype=np.int32)
    used = table[: counts.sum()]
    used[:] = np.repeat(runs, counts, axis=0)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # index of the first tile of each tile's segment
    used[:, 0] += (np.arange(len(used)) - first) * height
    np.minimum(used[:, 1], used[:, 0] + height, out=used[:, 1])
    return Tiles(height, table)
