"""One projection on one GPU, set up so that any launch of it can be made, checked and timed.

Letters as in `stack.py`, T rows.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ranklet.kernels import csgmv, fused_gemm
from ranklet.kernels.batch import Segments, Tiles
from ranklet.kernels.launch import is_hopper
from ranklet.kernels.tiles import ExpandTile, FusedTile, Op, ShrinkTile, Tile, TileKey
from ranklet.kernels.tuning.candidates import FEW_ROWS, candidates, cases
from ranklet.kernels.tuning.random_lora import (
    ProjectionShape,
    expanded,
    gpu_ms,
    graphed,
    random_lora,
    relative_error,
    shrunk,
)
from ranklet.kernels.workloads import Workload

MOST_PARTS = 4  # the largest `ShrinkTile.split` among the candidates


class TileLauncher:
    """Buffers for the largest of the workloads, whose tiles are in `cases` by (height, rows).

    Args:
        rank: the pool's; every adapter has it in full.
    """

    def __init__(
        self, projection: ProjectionShape, rank: int, workloads: tuple[Workload, ...], device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        made = cases(workloads)
        self.cases = {key: [tiles.on(device) for tiles in found] for key, found in made.items()}
        rows = max(rows for _, rows in made)
        slots = 1 + max(int(tiles.table[:, 2].max()) for found in made.values() for tiles in found)
        self.weights = random_lora(projection, rank, slots, device=device, dtype=dtype)
        self.rank = rank
        hidden = len(projection.widths) * rank
        self.x = torch.randn(rows, projection.wide, device=device, dtype=dtype)
        self.y = torch.randn(rows, sum(projection.widths), device=device, dtype=dtype)
        self.h = torch.randn(rows, hidden, device=device, dtype=dtype)
        self.parts = torch.zeros(MOST_PARTS, rows, hidden, device=device)
        self.chosen: dict[tuple[int, int], Tile] = {}  # for `shrink`, by tile height and rows of the batch

    def can_take(self, tile: Tile, key: TileKey) -> bool:
        """Whether the operation exists on this device for this projection and these batches."""
        if isinstance(tile, ShrinkTile | ExpandTile):
            return True
        return all(fused_gemm.can_fuse(self.x, self.weights.stack, tiles, tile) for tiles in self._tiles(key))

    def launch(self, tile: Tile, tiles: Tiles, rows: int, *, parts: int = 1, chained: bool = False) -> Tensor:
        """Start the operation a tile belongs to on a batch of so many rows, and return what it writes.

        Args:
            parts: of h, as `expand` reads it.
            chained: as in `csgmv`.
        """
        stack, y = self.weights.stack, self.y[:rows]
        if isinstance(tile, ShrinkTile):
            out = self._hidden(rows, tile.split)
            csgmv.shrink(self.x[:rows], out, stack, tiles, tile, chained=chained)
            return out
        if isinstance(tile, ExpandTile):
            csgmv.expand(self._hidden(rows, parts), y, stack, tiles, tile, chained=chained)
        else:
            fused_gemm.gemm(self.x[:rows], self.weights.weight, None, self._hidden(rows, 1), y, stack, tiles, tile)
        return y

    def time_ms(self, tile: Tile, key: TileKey) -> float:
        """Time of a launch summed over the workloads that share a key.

        In small batches the launches of a projection overlap, and one pays for how the other works: they are timed
        together.
        """
        if isinstance(tile, FusedTile) or key.rows > FEW_ROWS:
            return sum(gpu_ms(graphed(partial(self.launch, tile, tiles, key.rows))) for tiles in self._tiles(key))
        return sum(gpu_ms(graphed(partial(self._pair, tile, key, tiles))) for tiles in self._tiles(key))

    def _pair(self, tile: ShrinkTile | ExpandTile, key: TileKey, tiles: Tiles) -> None:
        """The base product, `shrink` and `expand`: the tile with the other's choice, or first candidate."""
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

    def base_ms(self, key: TileKey) -> float:
        """Time of the base product of the same rows, summed likewise."""
        weight = self.weights.weight.t()
        ranges = [slice(*tiles.rows) for tiles in self._tiles(key)]
        return sum(gpu_ms(partial(torch.mm, self.x[rows], weight, out=self.y[rows])) for rows in ranges)

    def error(self, tile: Tile, key: TileKey, wanted: Tensor) -> float:
        """Relative error of a launch, its output poisoned before; `wanted` as `reference` gives it."""
        tiles = self._tiles(key)[0]
        low, high = tiles.rows
        if isinstance(tile, ShrinkTile):
            self._hidden(key.rows, tile.split).fill_(torch.nan)
            return relative_error(self.launch(tile, tiles, key.rows)[:, low:high].float().sum(0), wanted)
        # `expand` adds to what is there, hence zeros; the fused product must write all of it.
        self.y.fill_(0.0 if isinstance(tile, ExpandTile) else torch.nan)
        return relative_error(self.launch(tile, tiles, key.rows)[low:high], wanted)

    def reference(self, key: TileKey) -> Tensor:
        """What the operation must write for the key's first workload, in float32 by torch: its rows of h or y."""
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
        """The keys of one operation, one for each tile height and number of rows."""
        wide, widths = self.weights.projection.wide, self.weights.projection.widths
        yield from (TileKey(op, wide, widths, self.rank, height, rows) for height, rows in sorted(self.cases))

    def _tiles(self, key: TileKey) -> list[Tiles]:
        return self.cases[key.height, key.rows]

    def _hidden(self, rows: int, parts: int) -> Tensor:
        return self.h[None, :rows] if parts == 1 else self.parts[:parts, :rows]
