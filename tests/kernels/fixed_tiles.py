"""A table of tiles that lets small batches use the fused products, which need many rows to pay."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from ranklet.kernels import fused_gemm, tiles
from ranklet.kernels.tiles import FusedTile, Tile, TileKey, TileTable


class FixedTiles(TileTable):
    """The default tiles, except one `FusedTile` for all fused products."""

    def __init__(self, tile: FusedTile, pays: Callable[[TileKey], bool]) -> None:
        super().__init__({}, "test")
        self._tile, self._pays = tile, pays

    def find(self, key: TileKey) -> Tile:
        return replace(self._tile, pays=self._pays(key)) if key.op in ("fused", "rotated") else super().find(key)


def fuse_small_batches(
    monkeypatch: pytest.MonkeyPatch, tile: FusedTile, pays: Callable[[TileKey], bool] = lambda key: True
) -> None:
    """Use `tile` for fused products where `pays` says so, whatever the number of rows."""
    table = FixedTiles(tile, pays)
    monkeypatch.setattr(tiles, "table", lambda device_index: table)
    monkeypatch.setattr(fused_gemm, "LEAST_ROWS", 0)
