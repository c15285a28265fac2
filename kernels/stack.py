"""The LoRA weights of all pool slots, for one projection.

Letters: S slots, R the pool's rank, K input width, N output width, V vocabulary. An adapter's rank is at most R; the
rest of its slot is zero. A projection may pack several slices side by side (q|k|v, gate|up). Each slice has its own R
rows of A and its own columns of the output.

Column terms are what DoRA and trained biases change: `y[n] = gain[n] * (what base and LoRA give)[n] + shift[n]`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def padded_rank(rank: int) -> int:
    """Round a rank up to a multiple of 16, the step of matrix units."""
    return -(-rank // 16) * 16


@dataclass(frozen=True, slots=True)
class SlotMeta:
    """Rank and scaling of each slice of one slot, and whether the slot has column terms. On the CPU."""

    ranks: tuple[int, ...]  # 0: the adapter does not target the slice
    scalings: tuple[float, ...]
    terms: bool = False

    @property
    def adapts(self) -> bool:
        """Return whether the adapter changes the projection."""
        return self.terms or any(self.ranks)


class _Stack:
    __slots__ = ()
    b: Tensor
    ranks: Tensor
    scalings: Tensor
    meta: list[SlotMeta]
    terms: Tensor | None

    @property
    def width(self) -> int:
        """Return the number of output columns."""
        return self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.b.shape[2]

    def describe(self, slot: int, meta: SlotMeta) -> None:
        self.meta[slot] = meta
        self.ranks[slot] = torch.tensor(meta.ranks, dtype=torch.int32)
        self.scalings[slot] = torch.tensor(meta.scalings)

    def holds_any(self, slots: Iterable[int]) -> bool:
        """Return whether an adapter in one of the slots changes this projection."""
        return any(self.meta[slot].adapts for slot in slots)


@dataclass(slots=True)
class LinearStack(_Stack):
    """A and B of all slots for one packed linear projection.

    `ranks` and `scalings` are the slots' metadata in device memory, for kernels. Their rows may be strided. They are
    allocated if not given.
    """

    a: Tensor  # [S, slices * R, K]
    b: Tensor  # [S, N, R]
    widths: tuple[int, ...]  # output columns of each slice; they add up to N
    ranks: Tensor = field(default=None)  # type: ignore[assignment]  # int32 [S, slices]
    scalings: Tensor = field(default=None)  # type: ignore[assignment]  # float32 [S, slices]
    terms: Tensor | None = None  # float32 [S, 2, N]: gains and shifts, 1 and 0 for a slot without; None if no slot has
    meta: list[SlotMeta] = field(init=False)

    def __post_init__(self) -> None:
        self.meta, self.ranks, self.scalings = _metadata(self.a, len(self.widths), self.ranks, self.scalings)


@dataclass(slots=True)
class EmbeddingStack(_Stack):
    """A and B of all slots for the token embedding. A is stored so that a token reads one contiguous row."""

    a: Tensor  # [S, V, R]
    b: Tensor  # [S, N, R]
    ranks: Tensor = field(default=None)  # type: ignore[assignment]  # int32 [S, 1]
    scalings: Tensor = field(default=None)  # type: ignore[assignment]  # float32 [S, 1]
    terms: Tensor | None = None  # as in `LinearStack`
    meta: list[SlotMeta] = field(init=False)

    def __post_init__(self) -> None:
        self.meta, self.ranks, self.scalings = _metadata(self.a, 1, self.ranks, self.scalings)


def _metadata(
    a: Tensor, slices: int, ranks: Tensor | None, scalings: Tensor | None
) -> tuple[list[SlotMeta], Tensor, Tensor]:
    empty = SlotMeta((0,) * slices, (0.0,) * slices)
    shape = (a.shape[0], slices)
    ranks = torch.zeros(shape, dtype=torch.int32, device=a.device) if ranks is None else ranks
    scalings = torch.zeros(shape, dtype=torch.float32, device=a.device) if scalings is None else scalings
    return [empty] * a.shape[0], ranks, scalings
