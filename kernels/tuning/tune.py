"""The offline tuner: finds the fastest tiles of each projection and the crossovers of the backends.

Compiling a candidate takes seconds. Many processes compile first; Triton keeps their results on disk. Then one process
checks each candidate against float32 and times it. Wrong candidates are dropped with a message, candidates that do not
fit the GPU without one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track

from ranklet.kernels.launch import is_hopper
from ranklet.kernels.stack import padded_rank
from ranklet.kernels.tiles import ExpandTile, FusedTile, Op, ShrinkTile, Tile, TileKey, path_for, table, to_entry
from ranklet.kernels.tuning import backends
from ranklet.kernels.tuning.candidates import FEW_ROWS, WORKLOADS, Workload, candidates, cases
from ranklet.kernels.tuning.compile import compile_all
from ranklet.kernels.tuning.launches import MOST_PARTS, TileLauncher
from ranklet.kernels.tuning.random_lora import ProjectionShape, projections

TOLERANCE = 3e-3  # relative error against float32
OPS: tuple[Op, ...] = ("shrink", "expand", "fused")


@dataclass(frozen=True, slots=True)
class TunePlan:
    """The launches to tune: each projection at each rank of a pool, on these workloads."""

    projections: tuple[ProjectionShape, ...]
    ranks: tuple[int, ...]
    workloads: tuple[Workload, ...]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class TuneJob:
    """A candidate that one process compiles, for all batches whose rows are cut at this height."""

    plan: TunePlan
    projection: ProjectionShape
    rank: int
    op: Op
    height: int
    tile: Tile


def tune(
    dims: Mapping[str, tuple[int, int]], ranks: Sequence[int], *, path: Path | None = None, rows: Sequence[int] = (),
    crossovers: bool = True, workers: int | None = None,
) -> Path:  # fmt: skip
    """Tune a model's projections on this machine's GPU and merge the results into the GPU's table.

    Args:
        dims: (input width, output width) by module.
        ranks: of adapters. Tiles are tuned for the rank of the pool that holds them.
        path: the table file, by default `tuned/<GPU>.json`.
        rows: batch sizes to tune for, by default all.
        crossovers: whether to time the backends against each other too, at the smallest and the largest rank.
        workers: number of processes that compile.

    Returns:
        The path of the table file.

    Raises:
        ValueError: there is no CUDA device, or no workload has one of `rows`.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: expected a CUDA device, got none; run it on the GPU that will serve")
    workloads = tuple(w for w in WORKLOADS if not rows or w.requests * w.length_tokens in rows)
    if not workloads:
        known = sorted({w.requests * w.length_tokens for w in WORKLOADS})
        raise ValueError(f"--rows: expected some of {known}, got {list(rows)}")
    pools = tuple(sorted({padded_rank(rank) for rank in ranks}))
    plan = TunePlan(projections(dims), pools, workloads, torch.device("cuda"), torch.bfloat16)
    path = path or path_for(torch.cuda.get_device_name())
    for entries in tune_tiles(plan, workers=workers):
        write(path, tiles=entries)
    table.cache_clear()
    if crossovers:
        write(path, crossovers=backends.measure(plan.projections, sorted({min(ranks), max(ranks)}), workers=workers))
    return path


def tune_tiles(plan: TunePlan, *, workers: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yield entries of a table file, the fastest correct tile of each launch: a list per projection and rank."""
    console = Console(stderr=True)
    jobs = list(_jobs(plan))
    attempts = compile_all(_compile, jobs, workers=workers)
    compiled = track(zip(jobs, attempts, strict=True), "compiling", len(jobs), console=console)
    fits = {job for job, done in compiled if done}
    console.print(f"{len(fits)} of {len(jobs)} candidates fit this GPU")
    pairs = [(projection, rank) for projection in plan.projections for rank in plan.ranks]
    for projection, rank in track(pairs, "timing", console=console):
        yield list(_best(_launcher(plan, projection, rank), plan, fits, console.print))


def _jobs(plan: TunePlan) -> Iterator[TuneJob]:
    heights = sorted({height for height, _ in cases(plan.workloads)})
    for projection in plan.projections:
        for rank in plan.ranks:
            for op in OPS:
                for height in heights:
                    tried = dict.fromkeys(
                        tile for h, rows in cases(plan.workloads) if h == height for tile in candidates(op, h, rows)
                    )
                    yield from (TuneJob(plan, projection, rank, op, height, tile) for tile in tried)


# The last launcher of this process. Only one fits: for a large model it takes gigabytes.
_cached: dict[tuple[TunePlan, ProjectionShape, int], TileLauncher] = {}


def _launcher(plan: TunePlan, projection: ProjectionShape, rank: int) -> TileLauncher:
    key = (plan, projection, rank)
    if key not in _cached:
        _cached.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _cached[key] = TileLauncher(projection, rank, plan.workloads, plan.device, plan.dtype)
    return _cached[key]


def _compile(job: TuneJob) -> None:
    launcher = _launcher(job.plan, job.projection, job.rank)
    for key in launcher.keys(job.op):
        height, rows = key.height, key.rows
        tried = height == job.height and job.tile in candidates(job.op, height, rows)
        if not tried or not launcher.supports(job.tile, key):
            continue
        batches = launcher.cases[height, rows]
        for tiles in batches:
            launcher.launch(job.tile, tiles, rows)
        if isinstance(job.tile, FusedTile) or rows > FEW_ROWS:
            continue
        if isinstance(job.tile, ExpandTile):
            for parts in (1, 2, MOST_PARTS):
                launcher.launch(job.tile, batches[0], rows, parts=parts, chained=is_hopper(launcher.x.device))
        launcher.time_ms(job.tile, key)


def _best(
    launcher: TileLauncher, plan: TunePlan, fits: set[TuneJob], report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    expand_ms: dict[tuple[int, int], float] = {}
    for op in OPS:
        for key in launcher.keys(op):
            times = _times_ms(launcher, plan, key, fits, report)
            if not times:
                continue
            batch = key.height, key.rows
            best, ms = min(times.items(), key=itemgetter(1))
            if isinstance(best, ShrinkTile):
                launcher.chosen[batch] = best
            elif isinstance(best, ExpandTile):
                expand_ms[batch] = ms
            else:
                unfused_ms = launcher.base_ms(key) + expand_ms.get(batch, float("inf"))
                best = replace(best, pays=ms <= unfused_ms)
            yield to_entry(key, best, ms)


def _times_ms(
    launcher: TileLauncher, plan: TunePlan, key: TileKey, fits: set[TuneJob], report: Callable[[str], None]
) -> dict[Tile, float]:
    projection, rank = launcher.weights.projection, launcher.rank
    jobs = {
        tile: TuneJob(plan, projection, rank, key.op, key.height, tile)
        for tile in candidates(key.op, key.height, key.rows)
    }
    fit = [tile for tile, job in jobs.items() if job in fits and launcher.supports(tile, key)]
    correct = list(_correct(launcher, key, fit, report))  # checks all first: timing overwrites the inputs
    return {tile: launcher.time_ms(tile, key) for tile in correct}


def _correct(
    launcher: TileLauncher, key: TileKey, tiles: Sequence[Tile], report: Callable[[str], None]
) -> Iterator[Tile]:
    if not tiles:
        return
    wanted = launcher.reference(key)
    for tile in tiles:
        error = launcher.error(tile, key, wanted)
        if error <= TOLERANCE:
            yield tile
        else:
            report(f"dropped: {tile} on {key} differs from float32 by {error:.1e}")


def write(path: Path, **found: list[dict[str, Any]]) -> None:
    """Merge entries into the lists `tiles` and `crossovers` of a table file. Replaces entries with the same key."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    head = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "triton": triton.__version__, "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    lists = {name: _merge(old.get(name, []), found.get(name, [])) for name in ("tiles", "crossovers")}
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(f' "{name}": [\n{_lines(entries)}\n ]' for name, entries in lists.items())
    path.write_text("{\n" + "".join(f' "{k}": {json.dumps(v)},\n' for k, v in head.items()) + body + "\n}\n")


def _merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(_key(entry)): entry for entry in [*old, *new]}.values())


def _key(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("tile", "ms")}


def _lines(entries: list[dict[str, Any]]) -> str:
    return ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
