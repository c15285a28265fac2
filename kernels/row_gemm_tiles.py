"""Tile shapes of the products of short batches, as measured on an H200.

Each tile is the fastest of 20 to 40 in a CUDA graph of chained products with the weights of all layers, at 16 to
1,024 rows. The second best tile is about 5 % slower. The tables list Qwen3-0.6B's projections first, then Llama-8B's.
`_LORA` was measured with adapters of rank 16.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ranklet.kernels.row_steps import ADDED, GATED, PLAIN

BUCKETS = (16, 64, 256, 512, 1024)  # rows; a row has the same result at all numbers of rows of a bucket
MOST_ROWS = BUCKETS[-1]
MOST_SPLIT_ROWS = 256  # tiles of more rows have no splits
LEAST_WIDTH = 16  # widths of a projection's slices are multiples of this
_OWN_ELEMENTS, _OWN_RANK = 64 << 20, 32  # above these, a launch for `s A x` is faster than all programs reading A


@dataclass(frozen=True, slots=True)
class ThinTile:
    """Launch parameters of `thin_kernel`, whose warps each multiply a part of K."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    early: bool  # load the first weights before waiting for the launch before
    own: bool = False  # with one adapter, programs compute `s A x` themselves
    block_m: int = 16
    run_ranks: int = 256  # ranks of adapters side by side in one product


@dataclass(frozen=True, slots=True)
class SplitTile:
    """Launch parameters of `split_kernel`."""

    block_m: int
    block_n: int
    block_k: int
    split: int  # programs that share a tile, each with a part of K
    warps: int
    stages: int
    run_ranks: int = 128


Tile = ThinTile | SplitTile


class _Product(NamedTuple):
    kind: int
    rows: int
    wide: int
    width: int


_BASE: dict[_Product, Tile] = {
    _Product(PLAIN, 16, 1024, 4096): ThinTile(32, 64, 4, 6, early=False),
    _Product(ADDED, 16, 2048, 1024): ThinTile(16, 256, 8, 2, early=True),
    _Product(GATED, 16, 1024, 3072): ThinTile(16, 128, 4, 3, early=True),
    _Product(ADDED, 16, 3072, 1024): ThinTile(16, 128, 4, 3, early=True),
    _Product(PLAIN, 64, 1024, 4096): SplitTile(64, 64, 128, 1, 4, 4),
    _Product(ADDED, 64, 2048, 1024): SplitTile(64, 32, 128, 4, 4, 4),
    _Product(GATED, 64, 1024, 3072): SplitTile(64, 32, 128, 1, 4, 4),
    _Product(ADDED, 64, 3072, 1024): SplitTile(64, 32, 128, 4, 4, 4),
    _Product(PLAIN, 256, 1024, 4096): SplitTile(64, 128, 128, 1, 4, 4),
    _Product(ADDED, 256, 2048, 1024): SplitTile(64, 64, 128, 2, 4, 4),
    _Product(GATED, 256, 1024, 3072): SplitTile(64, 64, 64, 1, 4, 4),
    _Product(ADDED, 256, 3072, 1024): SplitTile(64, 64, 128, 2, 4, 4),
    _Product(PLAIN, 512, 1024, 4096): SplitTile(128, 128, 64, 1, 4, 4),
    _Product(ADDED, 512, 2048, 1024): SplitTile(64, 64, 128, 1, 4, 4),
    _Product(GATED, 512, 1024, 3072): SplitTile(64, 128, 64, 1, 8, 4),
    _Product(ADDED, 512, 3072, 1024): SplitTile(64, 64, 128, 1, 4, 4),
    _Product(PLAIN, 1024, 1024, 4096): SplitTile(128, 256, 64, 1, 8, 3),
    _Product(ADDED, 1024, 2048, 1024): SplitTile(64, 128, 128, 1, 4, 4),
    _Product(GATED, 1024, 1024, 3072): SplitTile(64, 128, 64, 1, 8, 4),
    _Product(ADDED, 1024, 3072, 1024): SplitTile(64, 128, 128, 1, 4, 4),
    _Product(PLAIN, 16, 4096, 6144): ThinTile(16, 128, 4, 3, early=False),
    _Product(ADDED, 16, 4096, 4096): ThinTile(32, 64, 4, 6, early=False),
    _Product(GATED, 16, 4096, 14336): ThinTile(16, 128, 4, 3, early=False),
    _Product(ADDED, 16, 14336, 4096): ThinTile(32, 64, 4, 6, early=False),
    _Product(PLAIN, 64, 4096, 6144): SplitTile(64, 64, 128, 1, 4, 4),
    _Product(ADDED, 64, 4096, 4096): SplitTile(64, 32, 128, 2, 4, 4),
    _Product(GATED, 64, 4096, 14336): SplitTile(64, 64, 128, 1, 4, 4),
    _Product(ADDED, 64, 14336, 4096): SplitTile(64, 64, 128, 2, 4, 4),
    _Product(PLAIN, 256, 4096, 6144): SplitTile(128, 128, 64, 1, 4, 5),
    _Product(ADDED, 256, 4096, 4096): SplitTile(64, 128, 128, 1, 4, 4),
    _Product(GATED, 256, 4096, 14336): SplitTile(128, 128, 64, 1, 8, 4),
    _Product(ADDED, 256, 14336, 4096): SplitTile(64, 128, 128, 1, 4, 4),
}
_LORA: dict[_Product, Tile] = _BASE | {
    _Product(ADDED, 16, 2048, 1024): ThinTile(16, 64, 4, 6, early=False),
    _Product(GATED, 16, 1024, 3072): ThinTile(32, 64, 4, 4, early=False),
    _Product(ADDED, 16, 3072, 1024): ThinTile(16, 64, 4, 6, early=False),
    _Product(PLAIN, 64, 1024, 4096): SplitTile(64, 32, 128, 1, 4, 4),
    _Product(ADDED, 64, 2048, 1024): SplitTile(64, 32, 128, 2, 4, 4),
    _Product(ADDED, 64, 3072, 1024): SplitTile(64, 32, 128, 2, 4, 4),
    _Product(PLAIN, 256, 1024, 4096): SplitTile(64, 128, 128, 1, 4, 4, run_ranks=64),
    _Product(ADDED, 256, 2048, 1024): SplitTile(64, 64, 128, 2, 4, 4, run_ranks=64),
    _Product(GATED, 256, 1024, 3072): SplitTile(64, 64, 64, 1, 4, 4, run_ranks=64),
    _Product(ADDED, 256, 3072, 1024): SplitTile(64, 64, 128, 1, 4, 4, run_ranks=64),
    _Product(PLAIN, 512, 1024, 4096): SplitTile(128, 128, 64, 1, 8, 5),
    _Product(ADDED, 512, 2048, 1024): SplitTile(64, 64, 128, 1, 4, 4, run_ranks=64),
    _Product(GATED, 512, 1024, 3072): SplitTile(64, 64, 64, 1, 4, 4, run_ranks=64),
    _Product(ADDED, 512, 3072, 1024): SplitTile(64, 64, 128, 1, 4, 4, run_ranks=64),
    _Product(PLAIN, 1024, 1024, 4096): SplitTile(128, 256, 64, 1, 8, 3, run_ranks=64),
    _Product(ADDED, 1024, 2048, 1024): SplitTile(64, 128, 64, 1, 4, 5, run_ranks=64),
    _Product(GATED, 1024, 1024, 3072): SplitTile(64, 64, 64, 1, 4, 4, run_ranks=64),
    _Product(ADDED, 1024, 3072, 1024): SplitTile(64, 128, 64, 1, 4, 5, run_ranks=64),
    _Product(PLAIN, 16, 4096, 6144): ThinTile(32, 64, 4, 4, early=False),
    _Product(PLAIN, 64, 4096, 6144): SplitTile(64, 32, 128, 1, 4, 4),
    _Product(ADDED, 64, 4096, 4096): SplitTile(64, 32, 128, 2, 4, 4),
    _Product(PLAIN, 256, 4096, 6144): SplitTile(128, 128, 64, 1, 8, 4),
}


def find(kind: int, rows: int, wide: int, widths: tuple[int, ...], itemsize: int, rank: int | None) -> Tile:
    """Return the tile of the nearest measured product.

    Args:
        wide: K.
        widths: columns of each slice; for `GATED` of gate alone.
        rank: of the stack; None without LoRA.
    """
    bucket = next(bucket for bucket in BUCKETS if rows <= bucket)
    width = sum(widths)
    table = _BASE if rank is None else _LORA
    alike = [known for known in table if known.kind == kind and known.rows == bucket]
    tile = table[min(alike, key=lambda known: abs(math.log(known.wide / wide)) + abs(math.log(known.width / width)))]
    common = math.gcd(*widths)
    tile = replace(tile, block_n=min(tile.block_n, common & -common))
    if itemsize > 2:  # for the interpreter
        return replace(tile, block_k=32)
    if isinstance(tile, ThinTile):
        small = wide * width * (2 if kind == GATED else 1) <= _OWN_ELEMENTS
        return replace(tile, own=rank is not None and rank <= _OWN_RANK and small)
    return tile
