"""The LoRA weights of every slot, for one projection.

Letters: S slots, R the pool's rank (every adapter's rank is at most R and zero-filled up to it), K input width,
N output width, V vocabulary. A projection may be several slices packed side by side (q|k|v, gate|up): each slice has
R rows of its own in A and its own columns of the output.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class SlotMeta:
    """What is known on the CPU of one slot: per slice its rank (0: not targeted) and its scaling."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


@dataclass(slots=True)
class LinearStack:
    """A and B of all slots for one packed linear projection."""

    a: Tensor  # [S, slices * R, K]
    b: Tensor  # [S, N, R]
    widths: tuple[int, ...]  # output columns of each slice; they add up to N
    meta: list[SlotMeta] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meta = [self.empty() for _ in range(self.a.shape[0])]

    def empty(self) -> SlotMeta:
        """The metadata of a slot whose adapter leaves this projection alone."""
        return SlotMeta((0,) * len(self.widths), (0.0,) * len(self.widths))

    @property
    def rank(self) -> int:
        return self.b.shape[2]


@dataclass(slots=True)
class EmbeddingStack:
    """A and B of all slots for the token embedding; A is stored so that one token reads one contiguous row."""

    a: Tensor  # [S, V, R]
    b: Tensor  # [S, N, R]
    meta: list[SlotMeta] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meta = [self.empty() for _ in range(self.a.shape[0])]

    def empty(self) -> SlotMeta:
        """The metadata of a slot whose adapter leaves the embedding alone."""
        return SlotMeta((0,), (0.0,))

    @property
    def rank(self) -> int:
        return self.b.shape[2]
