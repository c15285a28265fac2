"""Launch parameters as data: tile shapes by operation, projection, rank, tile height and rows.

Each GPU has one JSON table under `tuned/`, written by `tuning/tune.py`. A launch that was not measured uses the nearest
entry. A GPU without a table uses the defaults below, which fit any GPU with 100 KB of shared memory.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import triton

from ranklet.kernels.row_tiles import SHORT_ROWS

TUNED = Path(__file__).parent / "tuned"
Op = Literal["shrink", "expand", "fused", "rotated", "gated"]

logger = logging.getLogger(__name__)


class TileKey(NamedTuple):
    """The launch that a tile is for."""

    op: Op
    wide: int  # K, the projection's input width
    widths: tuple[int, ...]  # output columns of its slices
    rank: int
    height: int  # rows of a tile
    rows: int  # of the whole batch
    itemsize: int = 2  # bytes of an element; tables hold launches of 2 bytes


@dataclass(frozen=True, slots=True)
class ShrinkTile:
    """Launch parameters of `shrink`."""

    block_k: int  # columns of x per step
    split: int  # programs that share a row tile
    warps: int
    stages: int
    registers: int = 0  # maximum per thread; 0: no limit


@dataclass(frozen=True, slots=True)
class ExpandTile:
    """Launch parameters of `expand`."""

    block_n: int  # output columns per step
    loop: int  # steps per program
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True, slots=True)
class FusedTile:
    """Launch parameters of a persistent product, such as the base product with LoRA."""

    block_n: int
    block_k: int
    group: int  # row blocks that run side by side
    halves: int  # 2: the output is stored in two halves, which frees shared memory for one more stage
    warps: int
    stages: int
    pays: bool = True  # False: the launch is slower than cuBLAS's base product and `expand`


Tile = ShrinkTile | ExpandTile | FusedTile
AnyTile = TypeVar("AnyTile", ShrinkTile, ExpandTile, FusedTile)
KINDS: dict[Op, type[Tile]] = {
    "shrink": ShrinkTile, "expand": ExpandTile, "fused": FusedTile, "rotated": FusedTile, "gated": FusedTile,
}  # fmt: skip

# In float32, where matrix units would round, Triton unrolls a step's products: compiling a kernel takes a minute with
# tiles for 16 bits, and a second with these. One tile serves all launches, which keeps the number of kernels small.
_UNROLLED: dict[Op, Tile] = {
    "shrink": ShrinkTile(block_k=16, split=1, warps=8, stages=2),
    "expand": ExpandTile(block_n=32, loop=4, warps=8, stages=2),
}
_TUNED_BYTES = 2  # itemsize of the launches that tables hold

# Base products without LoRA that include the next step. Each is the fastest of 20 tiles on an H200.
_WITHOUT_LORA: dict[Op, Tile] = {
    "rotated": FusedTile(block_n=256, block_k=64, group=16, halves=2, warps=8, stages=3),
    "gated": FusedTile(block_n=128, block_k=64, group=8, halves=1, warps=8, stages=3),
}

_SMALL_SHARED_BYTES = 99 << 10  # per program, of GPUs whose size is not known
_LEAST_STEP = 32
_FAR = 2.0  # such as rows and rank both off by a factor of e: reported in the log


def default(key: TileKey) -> Tile:
    if key.itemsize > _TUNED_BYTES and key.op in _UNROLLED:
        return _UNROLLED[key.op]
    if key.op in _WITHOUT_LORA:
        return _WITHOUT_LORA[key.op]
    short = key.height <= SHORT_ROWS
    if key.op == "shrink":
        return ShrinkTile(block_k=128 if short else 64, split=2 if short else 1, warps=4, stages=3)
    if key.op == "expand":
        return ExpandTile(block_n=128, loop=4, warps=4, stages=2)
    return FusedTile(block_n=128, block_k=64, group=8, halves=1, warps=8, stages=3, pays=not short)


class TileTable:
    """The measured tiles of one GPU.

    Args:
        source: the table's name in log lines.
        shared_bytes: shared memory that one program may use.
    """

    def __init__(self, entries: dict[TileKey, Tile], source: str, shared_bytes: int = _SMALL_SHARED_BYTES) -> None:
        self._entries = entries
        self._source = source
        self._shared_bytes = shared_bytes
        self._found: dict[TileKey, Tile] = {}

    def find(self, key: TileKey) -> Tile:
        """Return the measured tile of a launch, else the tile of the nearest measured launch, else the default."""
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
        if _distance(nearest, key) > _FAR:
            logger.info("%s has no tile for %s; using the tile of %s", self._source, key, nearest)
        return fitted(self._entries[nearest], key, self._shared_bytes)


def fitted(tile: Tile, key: TileKey, shared_bytes: int) -> Tile:
    """Return the tile with as many stages as fit in shared memory. If one stage does not fit, its steps are halved."""
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


def _shared_bytes(tile: Tile, key: TileKey) -> int:
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
    return (a.op, len(a.widths), a.itemsize) == (b.op, len(b.widths), b.itemsize)


def _distance(a: TileKey, b: TileKey) -> float:
    # In natural logarithms. Tile height weighs most.
    pairs = ((a.wide, b.wide), (sum(a.widths), sum(b.widths)), (a.rank, b.rank), (a.rows, b.rows))
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in pairs) + 4 * abs(math.log(a.height / b.height))


@cache
def table(device_index: int | None) -> TileTable:
    """Return the table of a CUDA device. For None, the CPU interpreter, it is empty."""
    if device_index is None:
        return TileTable({}, "the interpreter")
    properties = torch.cuda.get_device_properties(device_index)
    path = path_for(properties.name)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", _SMALL_SHARED_BYTES)
    if not path.is_file():
        logger.info("no %s: using default tiles; `ranklet tune` measures this GPU", path.name)
        return TileTable({}, properties.name, shared_bytes)
    content = json.loads(path.read_text())
    if content["triton"] != triton.__version__:
        logger.info("%s was tuned with Triton %s, this is %s", path.name, content["triton"], triton.__version__)
    return TileTable(dict(from_entry(entry) for entry in content["tiles"]), path.name, shared_bytes)


def find_tile(device: torch.device, kind: type[AnyTile], key: TileKey) -> AnyTile:
    found = table(device.index).find(key)
    assert isinstance(found, kind)
    return found


def path_for(gpu: str) -> Path:
    return TUNED / f"{gpu.replace(' ', '_').replace('/', '-')}.json"


def from_entry(entry: dict[str, Any]) -> tuple[TileKey, Tile]:
    key = TileKey(entry["op"], entry["k"], tuple(entry["widths"]), entry["rank"], entry["height"], entry["rows"])
    return key, KINDS[key.op](**entry["tile"])


def to_entry(key: TileKey, tile: Tile, ms: float) -> dict[str, Any]:
    return {
        "op": key.op, "k": key.wide, "widths": list(key.widths), "rank": key.rank, "height": key.height,
        "rows": key.rows, "tile": asdict(tile), "ms": round(ms, 5),
    }  # fmt: skip
