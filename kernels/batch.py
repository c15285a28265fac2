"""Which rows of a batch belong to which adapter.

Letters: T rows (tokens) of a batch, S slots of the adapter pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


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
class LoraBatch:
    """The LoRA side of one batch: segments end to end from row 0, at most one per slot.

    The rows behind the last segment use the base model alone and cost nothing.

    Raises:
        ValueError: the segments leave a gap, overlap, or end beyond the rows.
    """

    segments: tuple[Segment, ...]
    rows: int
    backend: str = "none"

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


def plan(lengths: Sequence[int], slots: Sequence[int | None]) -> tuple[list[int], LoraBatch]:
    """Order the requests of a batch by adapter, so that each adapter's rows stand together.

    It sorts requests, never rows: O(n log n) in requests, whatever their lengths.

    Args:
        lengths: rows of each request.
        slots: the pool slot of each request's adapter, None for the base model.

    Returns:
        The order to lay the requests out in (base-only requests last, arrival order kept inside an adapter), and the
        batch whose segments fit that layout.
    """
    order = sorted(range(len(lengths)), key=lambda i: (slots[i] is None, slots[i] or 0))
    segments = []
    start = 0
    for slot, requests in groupby(order, key=lambda i: slots[i]):
        stop = start + sum(lengths[i] for i in requests)
        if slot is not None and stop > start:
            segments.append(Segment(slot, start, stop))
        start = stop
    return order, LoraBatch(tuple(segments), rows=start)
