"""The LoRA side of one batch: which rows (tokens) use which adapter, and the backend that computes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.row_tiles import SHORT_ROWS, RowTiles, cut_padded, cut_runs
from ranklet.kernels.segments import Segment, Segments, runs_of
from ranklet.kernels.stack import EmbeddingStack, LinearStack
from ranklet.kernels.token_rows import TokenRows


class Backend(Protocol):
    """Computes projections and token embeddings with LoRA. `native.py` documents both methods."""

    NAME: str

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: "LoraBatch"
    ) -> Tensor: ...

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: "LoraBatch") -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Segments end to end from row 0, at most one per slot. Rows behind the last segment use the base model only.

    Attributes:
        segments: in the order of `plan`, segments of more than `SHORT_ROWS` rows first.
        rows: number of rows, with and without an adapter.
        implementation: set by `Backends.choose`. With None, only the base model is computed, and `backend` is "none".
        tiles: for backends that read them, see `cut`.
        padded: whether `tiles` were cut with `padded`. Launches must then not depend on the segments.
        everywhere: whether LoRA of each projection is computed, also where no adapter has one: then launches do not
            depend on the adapters' modules.
        terms: whether an adapter of the batch has column terms (see `stack.py`). Kernels apply them only then.
        token_rows: rows of tokens, if an adapter of the batch has its own. They are looked up only then.
        more_ids: number of token ids beyond the base model's, if an adapter of the batch has some. Logits then have as
            many more columns; -inf where a row's adapter does not have the token.

    Raises:
        ValueError: the segments leave a gap, overlap, or end beyond the rows.
    """

    segments: Sequence[Segment]
    rows: int
    implementation: Backend | None = None
    tiles: tuple[RowTiles, ...] = field(default=(), compare=False)
    padded: bool = False
    everywhere: bool = False
    terms: bool = False
    token_rows: TokenRows | None = None
    more_ids: int = 0

    def __post_init__(self) -> None:
        runs = runs_of(self.segments)
        ends = runs[:, 1]
        joined = len(runs) == 0 or (runs[0, 0] == 0 and ends[-1] <= self.rows and (runs[1:, 0] == ends[:-1]).all())
        if not joined:
            raise ValueError(f"segments: expected runs end to end within {self.rows} rows, got {self.segments}")

    @property
    def backend(self) -> str:
        return "none" if self.implementation is None else self.implementation.NAME

    @property
    def adapters(self) -> int:
        return len(self.segments)

    @property
    def lora_rows(self) -> int:
        return self.segments[-1].stop if self.segments else 0

    @property
    def variant(self) -> tuple[bool, bool, int]:
        """Return what kernels are launched for besides LoRA, a part of the key of CUDA graphs."""
        return self.terms, self.token_rows is not None, self.more_ids

    def reaches(self, stack: LinearStack) -> bool:
        """Return whether LoRA of a projection is computed."""
        return self.everywhere or stack.holds_any(segment.slot for segment in self.segments)

    def terms_of(self, stack: LinearStack | EmbeddingStack) -> Tensor | None:
        """Return the column terms of a projection; None if no row of the batch needs them."""
        return stack.terms if self.terms else None

    def with_tiles(self, device: torch.device) -> Self:
        return replace(self, tiles=tuple(tiles.to(device) for tiles in cut(self)))


def plan(lengths: Sequence[int], slots: Sequence[int | None]) -> tuple[list[int], LoraBatch]:
    """Order the requests of a batch so that each adapter's rows are adjacent, in O(n log n) of the number of requests.

    Args:
        lengths: rows of each request.
        slots: the pool slot of each request's adapter, None for the base model.

    Returns:
        The indices of the requests in their new order, and the batch for that order. Adapters with many rows come
        first, requests without an adapter last. Requests of one adapter keep their order.
    """
    # Converting the list at once is faster than replacing Nones.
    known = [-1 if one is None else one for one in slots] if None in slots else slots
    order, batch = plan_arrays(np.asarray(lengths, dtype=np.int64), np.asarray(known, dtype=np.int64))
    return order.tolist(), batch


def plan_arrays(lengths: NDArray[np.integer], slots: NDArray[np.integer]) -> tuple[NDArray[np.int64], LoraBatch]:
    """Do the same as `plan` for arrays, in which slot -1 stands for the base model."""
    if not len(lengths):
        return np.zeros(0, dtype=np.int64), LoraBatch((), rows=0)
    key = slots + 1
    rows = np.bincount(key, weights=lengths)
    late = (rows <= SHORT_ROWS) * len(rows)  # sorts short segments behind all long ones
    late[0] = 2 * len(rows)
    order = (late[key] + key).argsort(kind="stable")
    used = rows[1:].nonzero()[0] + 1
    used = used[late[used].argsort(kind="stable")]
    runs = np.empty((len(used), 3), dtype=np.int32)
    runs[:, 1] = stops = rows[used].cumsum()
    runs[:, 0] = stops - rows[used]
    runs[:, 2] = used - 1
    return order, LoraBatch(Segments(runs), rows=int(rows.sum()))


def plan_evenly(rows: int, adapters: int) -> LoraBatch:
    """Plan a batch whose rows are shared evenly by the adapters in slots 0, 1, ... Requires rows >= adapters."""
    return plan([rows // adapters + (i < rows % adapters) for i in range(adapters)], range(adapters))[1]


def cut(batch: LoraBatch, *, padded: bool = False) -> tuple[RowTiles, ...]:
    """Cut the segments into tiles. With `padded`, the result fits a CUDA graph, see `cut_padded`."""
    runs = runs_of(batch.segments)
    return cut_padded(runs, batch.rows) if padded else cut_runs(runs)
