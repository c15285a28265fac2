"""Launch numbers as data: tile shapes by operation, projection, rank, tile height and rows.

A table is one JSON file per GPU under `tuned/`, written by `tune.py`. What it has not measured takes its nearest entry,
and a GPU without a table takes the defaults below, which hold on any GPU with 100 KB of shared memory.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton

TUNED = Path(__file__).parent / "tuned"
Op = Literal["shrink", "expand", "fused", "rotated", "gated"]

logger = logging.getLogger(__name__)


class TileKey(NamedTuple):
    """What a launch number is tuned for."""

    op: Op
    wide: int  # K, the projection's input
    widths: tuple[int, ...]  # output columns of its slices
    rank: int
    height: int  # rows of a tile
    rows: int  # of the whole batch
    itemsize: int = 2  # bytes of an element; tables are tuned for so many


@dataclass(frozen=True, slots=True)
class ShrinkTile:
    """Of `shrink`: columns of x a step, programs that share a row tile, and what Triton needs."""

    block_k: int
    split: int
    warps: int
    stages: int
    registers: int = 0  # the most a thread may use; 0: as many as it likes


@dataclass(frozen=True, slots=True)
class ExpandTile:
    """Of `expand`: output columns a step, steps a program, and what Triton needs."""

    block_n: int
    loop: int
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True, slots=True)
class FusedTile:
    """Of the base product with LoRA in it: its block, how many row tiles run side by side, and what Triton needs."""

    block_n: int
    block_k: int
    group: int
    halves: int  # 2: the output is stored in two halves, which frees shared memory for one more stage
    warps: int
    stages: int
    pays: bool = True  # False: cuBLAS's base product and `expand` are faster


Tile = ShrinkTile | ExpandTile | FusedTile
KINDS: dict[str, type[ShrinkTile] | type[ExpandTile] | type[FusedTile]] = {
    "shrink": ShrinkTile,
    "expand": ExpandTile,
    "fused": FusedTile,
    "rotated": FusedTile,
    "gated": FusedTile,
}


_TALL = 64


def default(key: TileKey) -> Tile:
    """A sane tile for any GPU."""
    if key.itemsize > _TUNED_BYTES and key.op in _UNROLLED:
        return _UNROLLED[key.op]
    if key.op == "shrink":
        few = key.height <= 32
        return ShrinkTile(block_k=128 if few else 64, split=2 if few else 1, warps=4, stages=3)
    if key.op == "expand":
        return ExpandTile(block_n=128, loop=4, warps=4, stages=2)
    if key.op in _WHOLE:
        return _WHOLE[key.op]
    return FusedTile(block_n=128, block_k=64, group=8, halves=1, warps=8, stages=3, pays=key.height >= _TALL)


# Where matrix units would round, as in float32, Triton unrolls a step's products: with tiles made for 16 bits it
# compiles a kernel for a minute, with these for a second. One tile for all, since there are no more kernels then.
_UNROLLED: dict[str, Tile] = {
    "shrink": ShrinkTile(block_k=16, split=1, warps=8, stages=2),
    "expand": ExpandTile(block_n=32, loop=4, warps=8, stages=2),
}
_TUNED_BYTES = 2

# Products of the base alone that do the next step too. Of 20 tiles each these were the fastest on an H200.
_WHOLE = {
    "rotated": FusedTile(block_n=256, block_k=64, group=16, halves=2, warps=8, stages=3),
    "gated": FusedTile(block_n=128, block_k=64, group=8, halves=1, warps=8, stages=3),
}


class TileTable:
    """The measured tiles of one GPU."""

    def __init__(self, entries: dict[TileKey, Tile], source: str, shared_bytes: int = 99 << 10) -> None:
        self._entries = entries
        self._source = source
        self._shared_bytes = shared_bytes  # what one program may use of the GPU's shared memory
        self._found: dict[TileKey, Tile] = {}

    def find(self, key: TileKey) -> Tile:
        """The tile for a launch: measured, else of the nearest measured launch, else the default."""
        if key not in self._found:
            self._found[key] = self._look_up(key)
        return self._found[key]

    def _look_up(self, key: TileKey) -> Tile:
        if key in self._entries:
            return self._entries[key]
        near = [known for known in self._entries if _is_alike(known, key)]
        if not near:
            return fitted(default(key), key, self._shared_bytes)
        nearest = min(near, key=lambda known: _distance(known, key))
        if _distance(nearest, key) > _NEAR:
            logger.info("%s has no tile for %s; taking that of %s", self._source, key, nearest)
        return fitted(self._entries[nearest], key, self._shared_bytes)


def fitted(tile: Tile, key: TileKey, shared_bytes: int) -> Tile:
    """The tile with as many stages as shared memory holds for this launch, and steps cut in half where none fits."""
    while _shared_bytes(tile, key) > shared_bytes:
        if tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        elif isinstance(tile, ExpandTile) and tile.block_n > _LEAST_STEP:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif not isinstance(tile, ExpandTile) and tile.block_k > _LEAST_STEP:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            return tile
    return tile


_LEAST_STEP = 32


def _shared_bytes(tile: Tile, key: TileKey) -> int:
    """Shared memory of one program: operands of every stage, and what is loaded once."""
    rank = 1 << (key.rank - 1).bit_length()
    if isinstance(tile, ShrinkTile):
        elements = tile.stages * tile.block_k * (key.height + len(key.widths) * rank)
    elif isinstance(tile, ExpandTile):
        elements = key.height * rank + tile.stages * tile.block_n * (key.height + rank)
    else:
        once = key.height * (tile.block_n // tile.halves)
        elements = once + tile.stages * tile.block_k * (key.height + tile.block_n)
    return elements * key.itemsize


def _is_alike(a: TileKey, b: TileKey) -> bool:
    """Whether the tile of one launch may do for the other."""
    return (a.op, len(a.widths), a.itemsize) == (b.op, len(b.widths), b.itemsize)


_NEAR = 2.0  # two of rows, rank or widths off by a factor of e: near enough not to be worth a line


def _distance(a: TileKey, b: TileKey) -> float:
    """How unlike two launches are, in natural logarithms; another tile height weighs most."""
    pairs = ((a.wide, b.wide), (sum(a.widths), sum(b.widths)), (a.rank, b.rank), (a.rows, b.rows))
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in pairs) + 4 * abs(math.log(a.height / b.height))


@cache
def table(device_index: int | None) -> TileTable:
    """The table of a CUDA device (None: the CPU interpreter's, which is empty)."""
    if device_index is None:
        return TileTable({}, "the interpreter")
    properties = torch.cuda.get_device_properties(device_index)
    path = path_for(properties.name)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    if not path.is_file():
        logger.info("no %s: taking default tiles. `ranklet tune` measures this GPU", path.name)
        return TileTable({}, properties.name, shared_bytes)
    content = json.loads(path.read_text())
    if content["triton"] != triton.__version__:
        logger.info("%s was tuned with Triton %s, this is %s", path.name, content["triton"], triton.__version__)
    return TileTable(dict(_parse(entry) for entry in content["tiles"]), path.name, shared_bytes)


def path_for(gpu: str) -> Path:
    """The file with what was measured on a GPU of this name."""
    return TUNED / f"{gpu.replace(' ', '_').replace('/', '-')}.json"


def _parse(entry: dict[str, Any]) -> tuple[TileKey, Tile]:
    key = TileKey(entry["op"], entry["k"], tuple(entry["widths"]), entry["rank"], entry["height"], entry["rows"])
    return key, KINDS[key.op](**entry["tile"])


def entry_of(key: TileKey, tile: Tile, ms: float) -> dict[str, Any]:
    """A measured tile as a table holds it. `ms`: median milliseconds of the launch."""
    return {
        "op": key.op, "k": key.wide, "widths": list(key.widths), "rank": key.rank, "height": key.height,
        "rows": key.rows, "tile": asdict(tile), "ms": round(ms, 5),
    }  # fmt: skip
