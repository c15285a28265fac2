"""Which rows of a batch belong to which adapter, and how they are cut into tiles.

Letters: T rows (tokens) of a batch, S slots of the adapter pool.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.stack import EmbeddingStack, LinearStack

SHORT_ROWS = 32  # adapters with no more rows than this are cut into short tiles, the others into tall ones
SHORT_HEIGHTS = (16, 32)
TALL_HEIGHTS = (64, 128)
BLOCK_ROWS = 128


class Segment(NamedTuple):
    """A run of rows [start, stop) that all use the adapter in `slot`."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Segments(Sequence[Segment]):
    """Segments kept as one array, so that planning hundreds makes no object for each; equal to a tuple of the same."""

    def __init__(self, runs: NDArray[np.int32]) -> None:
        self.runs = runs  # [segments, 3]: first row, end row, slot

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Segment]:
        for start, stop, slot in self.runs.tolist():
            yield Segment(slot, start, stop)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Segment, ...]: ...
    def __getitem__(self, index: int | slice) -> Segment | tuple[Segment, ...]:
        if isinstance(index, slice):
            return tuple(Segments(self.runs[index]))
        start, stop, slot = self.runs[index].tolist()
        return Segment(slot, start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def runs_of(segments: Sequence[Segment]) -> NDArray[np.int32]:
    """Segments as an array [segments, 3]: first row, end row, slot."""
    if isinstance(segments, Segments):
        return segments.runs
    return np.array([(s.start, s.stop, s.slot) for s in segments], dtype=np.int32).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Segments that stand together, cut into tiles of at most `height` rows, each of one adapter.

    Their rows are also cut into blocks of `BLOCK_ROWS`, wherever segments end, for products that work so.
    """

    height: int
    table: NDArray[np.int32]  # [tiles, 3]: first row, end row, slot; an empty tile is (0, 0, 0)
    runs: NDArray[np.int32]  # [segments, 3]: the same of the segments
    blocks: NDArray[np.int32]  # [blocks, 2]: first and end segment that have rows in it, as rows of `runs`
    rows: tuple[int, int]  # first and end row of the blocks
    device: tuple[Tensor, Tensor, Tensor] | None = None  # table, runs and blocks where the kernels read them

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """What the kernels read."""
        return self.table, self.runs, self.blocks

    def on(self, device: torch.device) -> Self:
        """The same, with its arrays copied to a device."""
        table, runs, blocks = (torch.from_numpy(array).to(device) for array in self.arrays)
        return replace(self, device=(table, runs, blocks))


class Backend(Protocol):
    """Computes projections and token embeddings with LoRA; `native.py` says what, with all shapes."""

    NAME: str

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: "LoraBatch"
    ) -> Tensor: ...

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: "LoraBatch") -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The LoRA side of one batch: segments end to end from row 0, at most one per slot.

    `plan` puts those of more than `SHORT_ROWS` rows first. The rows behind the last segment use the base model alone
    and cost nothing.

    Raises:
        ValueError: the segments leave a gap, overlap, or end beyond the rows.
    """

    segments: Sequence[Segment]
    rows: int
    implementation: Backend | None = None  # from `Backends.choose`; None computes the base model only
    tiles: tuple[Tiles, ...] = field(default=(), compare=False)  # filled in for backends that need them
    padded: bool = False  # the tiles are of `cut(padded=True)`: what is launched must not depend on the segments

    def __post_init__(self) -> None:
        runs = runs_of(self.segments)
        ends = runs[:, 1]
        joined = len(runs) == 0 or (runs[0, 0] == 0 and ends[-1] <= self.rows and (runs[1:, 0] == ends[:-1]).all())
        if not joined:
            raise ValueError(f"segments: expected runs end to end within {self.rows} rows, got {self.segments}")

    @property
    def backend(self) -> str:
        """The implementation's name, or "none"."""
        return "none" if self.implementation is None else self.implementation.NAME

    @property
    def adapters(self) -> int:
        return len(self.segments)

    @property
    def lora_rows(self) -> int:
        """How many rows, from 0, have an adapter."""
        return self.segments[-1].stop if self.segments else 0

    def placed(self, device: torch.device) -> Self:
        """The batch cut into tiles, with their tables on a device (engines send them along with the token ids)."""
        return replace(self, tiles=tuple(tiles.on(device) for tiles in cut(self)))


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
    count = np.asarray(lengths, dtype=np.int64)
    if not len(count):
        return [], LoraBatch((), rows=0)
    # Places: 0 is the base, 1 + slot an adapter; numpy reads a list of numbers faster than Python replaces its Nones.
    if None in slots:
        place = np.array([0 if one is None else one + 1 for one in slots], dtype=np.int64)
    else:
        place = np.array(slots, dtype=np.int64) + 1
    rows = np.bincount(place, weights=count)
    late = (rows <= SHORT_ROWS) * len(rows)  # sorts short segments behind all long ones
    late[0] = 2 * len(rows)
    order = (late[place] + place).argsort(kind="stable")
    used = rows[1:].nonzero()[0] + 1
    used = used[late[used].argsort(kind="stable")]
    runs = np.empty((len(used), 3), dtype=np.int32)
    runs[:, 1] = stops = rows[used].cumsum()
    runs[:, 0] = stops - rows[used]
    runs[:, 2] = used - 1
    return order.tolist(), LoraBatch(Segments(runs), rows=int(rows.sum()))


def one_each(batch: LoraBatch, lengths: Sequence[int]) -> LoraBatch:
    """The batch with one row of each request instead of all, in the same order.

    Args:
        lengths: rows of each request, at least one, in the batch's order.
    """
    runs = runs_of(batch.segments).copy()
    runs[:, :2] = np.cumsum((0, *lengths)).searchsorted(runs[:, :2])
    return replace(batch, segments=Segments(runs), rows=len(lengths), tiles=())


def cut(batch: LoraBatch, *, padded: bool = False) -> tuple[Tiles, ...]:
    """The batch's segments as tiles: tall ones for the long segments that stand first, short ones for the rest.

    Kinds without a segment are left out. The height of a kind is the smallest that covers its typical segment: a launch
    has one height.

    Args:
        padded: so that a CUDA graph can replay other batches of so many rows: one kind whose height and tables' lengths
            follow from the rows and the next power of four of the adapters alone, blocks of all the batch's rows,
            those without an adapter too.
    """
    runs = runs_of(batch.segments)
    if padded:
        return (_padded(runs, batch.rows),) if len(runs) else ()
    short = runs[:, 1] - runs[:, 0] <= SHORT_ROWS
    tall = int(short.argmax()) if short.any() else len(runs)
    kinds = ((runs[:tall], TALL_HEIGHTS), (runs[tall:], SHORT_HEIGHTS))
    return tuple(_cut(found, heights) for found, heights in kinds if len(found))


def _cut(runs: NDArray[np.int32], heights: Sequence[int]) -> Tiles:
    rows = runs[:, 1] - runs[:, 0]
    typical = np.sort(rows)[len(rows) // 2]
    height = next((height for height in heights if typical <= height), heights[-1])
    span = (int(runs[0, 0]), int(runs[-1, 1]))
    return Tiles(height, _table(runs, height), runs, _blocks(runs, span), span)


def _table(runs: NDArray[np.int32], height: int) -> NDArray[np.int32]:
    counts = -(-(runs[:, 1] - runs[:, 0]) // height)
    ends = counts.cumsum()
    tiles = int(ends[-1])
    if tiles == len(runs):  # a tile each
        return runs
    table = runs.repeat(counts, axis=0)
    table[:, 0] += (np.arange(tiles) - (ends - counts).repeat(counts)) * height
    np.minimum(table[:, 1], table[:, 0] + height, out=table[:, 1])
    return table


def _padded(runs: NDArray[np.int32], rows: int) -> Tiles:
    adapters, heights = power_of_four(len(runs)), (*SHORT_HEIGHTS, *TALL_HEIGHTS)
    height = next((height for height in heights if rows <= height * adapters), heights[-1])
    most = rows // height + adapters  # an adapter has one tile, at most, that is not full
    table, padded = _filled(_table(runs, height), most), _filled(runs, adapters)
    return Tiles(height, table, padded, _blocks(runs, (0, rows)), (0, rows))


def _filled(table: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    return np.concatenate((table, np.zeros((length - len(table), 3), dtype=np.int32)))


def power_of_two(count: int) -> int:
    """The next power of two; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def power_of_four(count: int) -> int:
    """The next power of four; 1 for 0."""
    return 1 << (max(count - 1, 0).bit_length() + 1) // 2 * 2


def _blocks(runs: NDArray[np.int32], rows: tuple[int, int]) -> NDArray[np.int32]:
    starts = np.arange(*rows, BLOCK_ROWS, dtype=np.int32)
    blocks = np.empty((len(starts), 2), dtype=np.int32)
    blocks[:, 0] = runs[:, 1].searchsorted(starts, "right")
    blocks[:, 1] = runs[:, 0].searchsorted(starts + (BLOCK_ROWS - 1), "right")
    return blocks
