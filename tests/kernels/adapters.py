"""Random adapters of many ranks, and batches of them, for tests of the backends."""

from collections.abc import Sequence

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import LinearStack
from tests.kernels import oracle

NAN = float("nan")
WIDE, SLOTS, RANK = 40, 6, 64
QKV = (24, 8, 8)
RANKS = {0: (1, 1, 1), 1: (3, 0, 8), 2: (8, 8, 8), 3: (40, 64, 40), 4: (64, 64, 64), 5: (0, 0, 0)}
LINEAR = oracle.random_adapters(RANKS, WIDE, QKV)


def slots_by_row(batch: LoraBatch) -> list[int | None]:
    """Return the slot of every row, None for base rows."""
    rows = [segment.slot for segment in batch.segments for _ in range(segment.rows)]
    return [*rows, *[None] * (batch.rows - len(rows))]


def stack_of(
    adapters: oracle.Adapters, wide: int = WIDE, widths: Sequence[int] = QKV, device: str = "cpu"
) -> LinearStack:
    return oracle.linear_stack(adapters, SLOTS, RANK, wide, widths, stale=NAN, device=device)


def batch_of(slot: int, rows: int = 4) -> LoraBatch:
    """Return a batch whose rows all use one slot."""
    return LoraBatch((Segment(slot, 0, rows),), rows=rows)
