"""The LoRA tile tables that travel in a step's buffer: of all tokens, and of those that a head reads."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ranklet.kernels.batch import LoraBatch, cut
from ranklet.kernels.row_tiles import RowTiles

TileShapes = tuple[tuple[int | tuple[int, int], ...], ...]


def tiled(batch: LoraBatch, rows: int, *, padded: bool, everywhere: bool = False) -> LoraBatch:
    """Add fillers up to this number of rows, and cut the batch into tiles if its backend reads them."""
    batch = batch if rows == batch.rows else replace(batch, rows=rows)
    if batch.backend != "csgmv":
        return batch
    return replace(batch, tiles=cut(batch, padded=padded), padded=padded, everywhere=everywhere)


def all_tiles(lora: LoraBatch, narrow: LoraBatch | None) -> list[RowTiles]:
    return [*lora.tiles, *(narrow.tiles if narrow is not None else ())]


def shapes_of(lora: LoraBatch, narrow: LoraBatch | None) -> TileShapes:
    """Return the sizes of the tables, on which kernel launches depend."""
    tiles = all_tiles(lora, narrow)
    return tuple((t.height, t.rows, len(t.table), len(t.runs), len(t.blocks)) for t in tiles)


def placed(lora: LoraBatch, narrow: LoraBatch | None, tables: Sequence[Tensor]) -> tuple[LoraBatch, LoraBatch | None]:
    """Return the batches with their tables on the device.

    Args:
        tables: the arrays of `all_tiles` on the device, in order.
    """
    moved = [
        replace(kind, on_device=(tables[3 * i], tables[3 * i + 1], tables[3 * i + 2]))
        for i, kind in enumerate(all_tiles(lora, narrow))
    ]
    count = len(lora.tiles)
    return (
        replace(lora, tiles=tuple(moved[:count])),
        None if narrow is None else replace(narrow, tiles=tuple(moved[count:])),
    )
