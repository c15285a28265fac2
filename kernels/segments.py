"""Runs of rows (tokens) of a batch that share an adapter."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """Rows [start, stop) of a batch, which use the adapter in pool slot `slot`."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Segments(Sequence[Segment]):
    """Segments stored as one array, so that planning a large batch creates few objects. Equal to a tuple of segments.

    Attributes:
        runs: [segments, 3]: first row, end row, slot.
    """

    def __init__(self, runs: NDArray[np.int32]) -> None:
        self.runs = runs

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
    """Return segments as an array [segments, 3]: first row, end row, slot."""
    if isinstance(segments, Segments):
        return segments.runs
    return np.array([(s.start, s.stop, s.slot) for s in segments], dtype=np.int32).reshape(-1, 3)
