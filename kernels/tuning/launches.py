"""Launches the kernels of one projection, to check and time tiles.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ranklet.kernels import fused_gemm
from ranklet.kernels.expand import expand
from ranklet.kernels.launch import is_hopper
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.segments import Segments
from ranklet.kernels.shrink import shrink
from ranklet.kernels.tiles import ExpandTile, FusedTile, Op, ShrinkTile, Tile, TileKey
from ranklet.kernels.tuning.candidates import FEW_ROWS, Workload, candidates, cases
from ranklet.kernels.tuning.random_lora import (
    ProjectionShape,
    expanded,
    gpu_ms,
    graphed,
    random_lora,
    relative_error,
    shrunk,
)

MOST_PARTS = 4  # the largest `ShrinkTile.split` among the candidates


class TileLauncher:
    """Launches tiles of one projection with random weights, on the given workloads.

    Args:
        rank: of the pool. Every adapter has this rank.

    Attributes:
        cases: the workloads' tiles by tile height and rows of the batch.
        chosen: the best `ShrinkTile` by tile height and rows of the batch, set by the tuner.
    """

    def __init__(
        self, projection: ProjectionShape, rank: int, workloads: tuple[Workload, ...], device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        made = cases(workloads)
        self.cases = {key: [tiles.to(device) for tiles in found] for key, found in made.items()}
        rows = max(rows for _, rows in made)
        slots = 1 + max(int(tiles.table[:, 2].max()) for found in made.values() for tiles in found)
        self.weights = random_lora(projection, rank, slots, device=device, dtype=dtype)
        self.rank = rank
        hidden = len(projection.widths) * rank
        self.x = torch.randn(rows, projection.wide, device=device, dtype=dtype)
        self.y = torch.randn(rows, sum(projection.widths), device=device, dtype=dtype)
        self.h = torch.randn(rows, hidden, device=device, dtype=dtype)
        self.parts = torch.zeros(MOST_PARTS, rows, hidden, device=device)
        self.chosen: dict[tuple[int, int], Tile] = {}

    def supports(self, tile: Tile, key: TileKey) -> bool:
        if isinstance(tile, ShrinkTile | ExpandTile):
            return True
        return all(fused_gemm.can_fuse(self.x, self.weights.stack, tiles, tile) for tiles in self._tiles(key))

    def launch(self, tile: Tile, tiles: RowTiles, rows: int, *, parts: int = 1, chained: bool = False) -> Tensor:
        """Launch an operation with a tile on a batch of `rows` rows, and return its output.

        Args:
            parts: number of parts of h that `expand` sums.
            chained: see `shrink`.
        """
        stack, y = self.weights.stack, self.y[:rows]
        if isinstance(tile, ShrinkTile):
            out = self._hidden(rows, tile.split)
            shrink(self.x[:rows], out, stack, tiles, tile, chained=chained)
            return out
        if isinstance(tile, ExpandTile):
            expand(self._hidden(rows, parts), y, stack, tiles, tile, chained=chained)
        else:
            fused_gemm.gemm(self.x[:rows], self.weights.weight, None, self._hidden(rows, 1), y, stack, tiles, tile)
        return y

    def time_ms(self, tile: Tile, key: TileKey) -> float:
        """Return the time of a launch, summed over the workloads with this key.

        In small batches, `shrink` and `expand` overlap and affect each other's time, so both are timed together.
        """
        if isinstance(tile, FusedTile) or key.rows > FEW_ROWS:
            return sum(gpu_ms(graphed(partial(self.launch, tile, tiles, key.rows))) for tiles in self._tiles(key))
        return sum(gpu_ms(graphed(partial(self._pair, tile, key, tiles))) for tiles in self._tiles(key))

    def base_ms(self, key: TileKey) -> float:
        weight = self.weights.weight.t()
        ranges = [slice(*tiles.rows) for tiles in self._tiles(key)]
        return sum(gpu_ms(partial(torch.mm, self.x[rows], weight, out=self.y[rows])) for rows in ranges)

    def error(self, tile: Tile, key: TileKey, wanted: Tensor) -> float:
        tiles = self._tiles(key)[0]
        low, high = tiles.rows
        if isinstance(tile, ShrinkTile):
            self._hidden(key.rows, tile.split).fill_(torch.nan)
            return relative_error(self.launch(tile, tiles, key.rows)[:, low:high].float().sum(0), wanted)
        # `expand` adds to its output, hence zeros; the fused product must write every row.
        self.y.fill_(0.0 if isinstance(tile, ExpandTile) else torch.nan)
        return relative_error(self.launch(tile, tiles, key.rows)[low:high], wanted)

    def reference(self, key: TileKey) -> Tensor:
        """Return the rows that the operation computes for the first workload with this key, in float32."""
        tiles = self._tiles(key)[0]
        stack = self.weights.stack
        if key.op == "shrink":
            return torch.cat([shrunk(self.x, stack, segment) for segment in Segments(tiles.runs)])
        added = [expanded(self.h[s.start : s.stop], stack, s.slot) for s in Segments(tiles.runs)]
        if key.op == "expand":
            return torch.cat(added)
        low, high = tiles.rows
        return torch.addmm(torch.cat(added), self.x[low:high].float(), self.weights.weight.float().t())

    def keys(self, op: Op) -> Iterator[TileKey]:
        wide, widths = self.weights.projection.wide, self.weights.projection.widths
        yield from (TileKey(op, wide, widths, self.rank, height, rows) for height, rows in sorted(self.cases))

    def _pair(self, tile: ShrinkTile | ExpandTile, key: TileKey, tiles: RowTiles) -> None:
        # The base product, then `shrink` and `expand`: one with `tile`, the other with its best or first candidate.
        pair = [candidates(op, key.height, key.rows)[0] for op in ("shrink", "expand")]
        if isinstance(tile, ExpandTile):
            pair = [self.chosen.get((key.height, key.rows), pair[0]), tile]
        else:
            pair[0] = tile
        assert isinstance(pair[0], ShrinkTile)
        chained = is_hopper(self.x.device)
        torch.mm(self.x[: key.rows], self.weights.weight.t(), out=self.y[: key.rows])
        self.launch(pair[0], tiles, key.rows, chained=chained)
        self.launch(pair[1], tiles, key.rows, parts=pair[0].split, chained=chained)

    def _tiles(self, key: TileKey) -> list[RowTiles]:
        return self.cases[key.height, key.rows]

    def _hidden(self, rows: int, parts: int) -> Tensor:
        return self.h[None, :rows] if parts == 1 else self.parts[:parts, :rows]
