"""The tiles that the tuner tries for each operation, and the workloads it tries them on.

On an H200, the best of 24 to 60 tiles was always among these or within 2 % of one of them.
"""

from dataclasses import dataclass

from ranklet.kernels.batch import LoraBatch, cut, plan
from ranklet.kernels.mixes import Mix, assign
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.tiles import ExpandTile, FusedTile, Op, ShrinkTile, Tile

FEW_ROWS = 1024  # smaller batches leave most of a GPU idle unless parts of K are computed in parallel


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of requests of one length."""

    mix: Mix
    requests: int
    length_tokens: int
    adapters: int

    def batch(self) -> LoraBatch:
        return plan([self.length_tokens] * self.requests, assign(self.mix, self.requests, self.adapters))[1]


WORKLOADS = (
    Workload("distinct", 256, 1, 32),
    Workload("distinct", 256, 1, 8),
    Workload("distinct", 256, 1, 4),
    Workload("skewed", 256, 1, 32),
    Workload("identical", 256, 1, 1),
    Workload("distinct", 256, 16, 256),
    Workload("distinct", 128, 32, 128),
    Workload("uniform", 64, 64, 64),
    Workload("distinct", 64, 64, 64),
    Workload("identical", 8, 512, 1),
    Workload("distinct", 16, 256, 16),
    Workload("distinct", 64, 480, 64),
    Workload("skewed", 60, 512, 32),
    Workload("distinct", 4, 7680, 4),
)


def cases(workloads: tuple[Workload, ...] = WORKLOADS) -> dict[tuple[int, int], list[RowTiles]]:
    """Return the workloads' row tiles by their height and the rows of the whole batch."""
    found: dict[tuple[int, int], list[RowTiles]] = {}
    for workload in workloads:
        batch = workload.batch()
        for tiles in cut(batch):
            found.setdefault((tiles.height, batch.rows), []).append(tiles)
    return found


def candidates(op: Op, height: int, rows: int) -> tuple[Tile, ...]:
    """Return the tiles to try, the safest first. Empty if the operation is not used for so few rows."""
    if op == "shrink":
        return _shrink(height, rows)
    if op == "expand":
        return _EXPAND_SHORT if height <= 32 else _EXPAND_TALL
    return _FUSED if rows > FEW_ROWS else ()


def _shrink(height: int, rows: int) -> tuple[ShrinkTile, ...]:
    if height > 32 and rows > FEW_ROWS:
        more = (ShrinkTile(64, 2, 4, 3),) if height == 64 else ()
        return (*_SHRINK_TALL, *more)
    parts = (1, 2, 4) if rows <= FEW_ROWS or height <= 32 else (1, 2)
    block_k = 128 if height <= 32 else 64
    split = tuple(ShrinkTile(block_k, split, 4, 3) for split in parts)
    wide = (ShrinkTile(256, 4, 8, 3),) if rows <= FEW_ROWS else ()
    return (*split, *wide, ShrinkTile(128, 1, 4, 2), ShrinkTile(128, 1, 8, 2), ShrinkTile(64, 1, 4, 4))


_SHRINK_TALL = (
    ShrinkTile(64, 1, 4, 3), ShrinkTile(64, 1, 4, 4), ShrinkTile(64, 1, 8, 3), ShrinkTile(64, 1, 8, 4),
    ShrinkTile(128, 1, 8, 2), ShrinkTile(64, 1, 8, 3, registers=128),
)  # fmt: skip
_EXPAND_SHORT = (
    ExpandTile(128, 1, 4, 1), ExpandTile(128, 4, 4, 2), ExpandTile(64, 1, 4, 1), ExpandTile(64, 8, 4, 2),
    ExpandTile(256, 1, 4, 1), ExpandTile(128, 8, 4, 2), ExpandTile(256, 4, 4, 2), ExpandTile(128, 4, 4, 3),
    ExpandTile(64, 1, 4, 1, registers=64), ExpandTile(64, 4, 4, 3, registers=64),
)  # fmt: skip
_EXPAND_TALL = (
    ExpandTile(64, 1, 4, 1), ExpandTile(64, 1, 8, 1), ExpandTile(128, 4, 8, 2), ExpandTile(128, 8, 8, 2),
)  # fmt: skip
_FUSED = (
    FusedTile(128, 64, 8, 1, 8, 3), FusedTile(256, 64, 8, 1, 8, 3), FusedTile(256, 64, 8, 2, 8, 4),
    FusedTile(128, 64, 8, 2, 4, 3), FusedTile(256, 64, 16, 1, 8, 3), FusedTile(256, 64, 8, 2, 8, 3),
)  # fmt: skip
