"""Selects rows of a batch, for a projection that is computed for these rows only, such as `lm_head`.

A head often reads a few rows of each request (pruned logits), and may be called on chunks of them. Each call needs a
batch of exactly its rows: with the full batch, rows would silently get the wrong adapter. A subset keeps the backend,
but not the tiles. Segments keep their order, so a long segment may come after a shortened one.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.segments import Segments, runs_of


def check_rows(x: Tensor, batch: LoraBatch) -> None:
    if x.shape[0] != batch.rows:
        raise ValueError(
            f"rows: expected {batch.rows}, the rows of the batch, got {x.shape[0]}; "
            "make a batch of the rows that are passed with ranklet.kernels.row_subset"
        )


def one_each(batch: LoraBatch, lengths: Sequence[int]) -> LoraBatch:
    """Return the batch of one row per request.

    Args:
        lengths: rows of each request, at least one, in the order of the batch.
    """
    runs = runs_of(batch.segments).copy()
    runs[:, :2] = np.cumsum((0, *lengths)).searchsorted(runs[:, :2])
    return replace(batch, segments=Segments(runs), rows=len(lengths), tiles=())


def subset(batch: LoraBatch, rows: NDArray[np.integer]) -> LoraBatch:
    """Return the batch whose row i is row `rows[i]` of `batch`.

    Args:
        rows: [kept], increasing, each in [0, batch.rows).

    Raises:
        ValueError: a row is out of range, or the rows do not increase.
    """
    if rows.size and not (rows[0] >= 0 and rows[-1] < batch.rows and bool((rows[1:] > rows[:-1]).all())):
        raise ValueError(f"rows: expected increasing indices in [0, {batch.rows}), got {rows}")
    runs = runs_of(batch.segments)
    return _cut(batch, runs[:, 2], rows.searchsorted(runs[:, 1]), rows.size)


def subset_by_counts(batch: LoraBatch, kept_per_request: Sequence[int], rows_per_request: Sequence[int]) -> LoraBatch:
    """Return the batch of the rows that each request keeps.

    Args:
        kept_per_request: number of rows that each request keeps, in the order of the batch.
        rows_per_request: number of rows that each request has in `batch`.

    Raises:
        ValueError: the counts contradict each other or the batch.
    """
    kept, rows = np.asarray(kept_per_request, dtype=np.int64), np.asarray(rows_per_request, dtype=np.int64)
    if kept.shape != rows.shape or (kept < 0).any() or (kept > rows).any():
        raise ValueError(f"kept rows: expected at most the requests' {rows_per_request}, got {kept_per_request}")
    ends = np.concatenate(([0], rows.cumsum()))
    kept_ends = np.concatenate(([0], kept.cumsum()))
    runs = runs_of(batch.segments)
    stops = runs[:, 1]
    at = np.searchsorted(ends, stops)
    if ends[-1] != batch.rows or (ends[at] != stops).any():
        raise ValueError(
            f"rows of the requests: expected a sum of {batch.rows}, and segments {batch.segments} that end where "
            f"requests end, got {rows_per_request}; pass the requests in the order that `plan` returned"
        )
    return _cut(batch, runs[:, 2], kept_ends[at], int(kept_ends[-1]))


def row_range(batch: LoraBatch, start: int, stop: int) -> LoraBatch:
    """Return the batch of rows [start, stop).

    Raises:
        ValueError: the range exceeds the batch.
    """
    if not 0 <= start <= stop <= batch.rows:
        raise ValueError(f"rows: expected a range in [0, {batch.rows}], got [{start}, {stop})")
    runs = runs_of(batch.segments)
    return _cut(batch, runs[:, 2], runs[:, 1].clip(start, stop) - start, stop - start)


def _cut(batch: LoraBatch, slots: NDArray[np.integer], stops: NDArray[np.integer], rows: int) -> LoraBatch:
    runs = np.empty((len(slots), 3), dtype=np.int32)
    runs[:1, 0], runs[1:, 0] = 0, stops[:-1]
    runs[:, 1], runs[:, 2] = stops, slots
    runs = runs[runs[:, 1] > runs[:, 0]]
    implementation = batch.implementation if len(runs) else None
    return replace(
        batch,
        segments=Segments(runs),
        rows=rows,
        implementation=implementation,
        tiles=(),
        padded=False,
        everywhere=False,
    )
