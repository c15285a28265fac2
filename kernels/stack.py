"""The LoRA weights of every slot, for one projection.

Letters: S slots, R the pool's rank (every adapter's rank is at most R and zero-filled up to it), K input width,
N output width, V vocabulary. A projection may be several slices packed side by side (q|k|v, gate|up): each slice has
R rows of its own in A and its own columns of the output.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def padded_rank(rank: int) -> int:
    """The rank a slot keeps for adapters of up to this rank: matrix units take 16 at a time."""
    return -(-rank // 16) * 16


@dataclass(frozen=True, slots=True)
class SlotMeta:
    """What is known on the CPU of one slot: per slice its rank (0: not targeted) and its scaling."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


@dataclass(slots=True)
class LinearStack:
    """A and B of all slots for one packed linear projection.

    `ranks` and `scalings` hold the slots' metadata where kernels read it; rows may be strided.
    """

    a: Tensor  # [S, slices * R, K]
    b: Tensor  # [S, N, R]
    widths: tuple[int, ...]  # output columns of each slice; they add up to N
    ranks: Tensor = field(default=None)  # type: ignore[assignment]  # int32 [S, slices]; made here if not given
    scalings: Tensor = field(default=None)  # type: ignore[assignment]  # float32 [S, slices]; the same
    meta: list[SlotMeta] = field(init=False)

    def __post_init__(self) -> None:
        self.meta, self.ranks, self.scalings = _metadata(self.a, len(self.widths), self.ranks, self.scalings)

    def describe(self, slot: int, meta: SlotMeta) -> None:
        """Say what is in a slot."""
        _describe(self, slot, meta)

    def holds_any(self, slots: Iterable[int]) -> bool:
        """Whether any adapter in these slots has LoRA on this projection."""
        return any(any(self.meta[slot].ranks) for slot in slots)

    @property
    def rank(self) -> int:
        return self.b.shape[2]


@dataclass(slots=True)
class EmbeddingStack:
    """A and B of all slots for the token embedding; A is stored so that one token reads one contiguous row."""

    a: Tensor  # [S, V, R]
    b: Tensor  # [S, N, R]
    ranks: Tensor = field(default=None)  # type: ignore[assignment]  # int32 [S, 1]; as in LinearStack
    scalings: Tensor = field(default=None)  # type: ignore[assignment]  # float32 [S, 1]
    meta: list[SlotMeta] = field(init=False)

    def __post_init__(self) -> None:
        self.meta, self.ranks, self.scalings = _metadata(self.a, 1, self.ranks, self.scalings)

    def describe(self, slot: int, meta: SlotMeta) -> None:
        """Say what is in a slot."""
        _describe(self, slot, meta)

    @property
    def rank(self) -> int:
        return self.b.shape[2]


def _metadata(
    a: Tensor, slices: int, ranks: Tensor | None, scalings: Tensor | None
) -> tuple[list[SlotMeta], Tensor, Tensor]:
    empty = SlotMeta((0,) * slices, (0.0,) * slices)
    shape = (a.shape[0], slices)
    ranks = torch.zeros(shape, dtype=torch.int32, device=a.device) if ranks is None else ranks
    scalings = torch.zeros(shape, dtype=torch.float32, device=a.device) if scalings is None else scalings
    return [empty] * a.shape[0], ranks, scalings


def _describe(stack: LinearStack | EmbeddingStack, slot: int, meta: SlotMeta) -> None:
    stack.meta[slot] = meta
    stack.ranks[slot] = torch.tensor(meta.ranks, dtype=torch.int32)
    stack.scalings[slot] = torch.tensor(meta.scalings)
