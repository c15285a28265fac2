"""Times the LoRA backends on whole decoder layers, so that `dispatch` can choose the fastest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from ranklet.kernels.batch import LoraBatch, plan_evenly
from ranklet.kernels.cost_model import LoraLayer
from ranklet.kernels.crossover import Crossover, Scope, crossovers, to_entry
from ranklet.kernels.dispatch import NAMES, Backends
from ranklet.kernels.stack import padded_rank
from ranklet.kernels.tuning.compile import compile_all
from ranklet.kernels.tuning.random_lora import ProjectionShape, RandomLora, random_lora, wall_ms

ADAPTERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS = (16, 64, 256, 1024, 3072, 7680, 15_360, 30_720)
SCOPES: dict[Scope, tuple[str, ...]] = {"attention": ("qkv", "o"), "layer": ("qkv", "o", "gate_up", "down")}


class MeasuredLayer:
    """The projections of a decoder layer with random weights and inputs, and adapters of one rank in all slots."""

    def __init__(
        self, projections: Sequence[ProjectionShape], rank: int, slots: int, rows: int, *, device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.hidden = projections[0].wide
        self.loras: dict[str, RandomLora] = {
            p.name: random_lora(p, rank, slots, device=device, dtype=dtype) for p in projections
        }
        wides = {p.wide for p in projections}
        self._inputs = {wide: torch.randn(rows, wide, device=device, dtype=dtype) for wide in wides}
        self.device = device
        shapes = tuple((p.wide, p.widths) for p in projections)
        self.backends = Backends(LoraLayer(shapes, padded_rank(rank), device.type == "cuda"))

    def input(self, name: str, rows: int) -> Tensor:
        return self._inputs[self.loras[name].projection.wide][:rows]

    def run(self, backend: str, batch: LoraBatch, names: Sequence[str]) -> list[Tensor]:
        """Compute projections one after the other, and return their outputs. Backend "base" is without LoRA."""
        made = []
        for name in names:
            x, found = self.input(name, batch.rows), self.loras[name]
            if backend == "base":
                made.append(functional.linear(x, found.weight))
            else:
                made.append(self.backends.by_name[backend].linear(x, found.weight, None, found.stack, batch))
        return made


@dataclass(frozen=True, slots=True)
class CompileJob:
    """A batch whose csgmv kernels one process compiles.

    Attributes:
        slots, most_rows: of the largest job, so that jobs of one rank share a layer.
    """

    projections: tuple[ProjectionShape, ...]
    rank: int
    rows: int
    adapters: int
    slots: int
    most_rows: int


# The last layer of this worker process. Only one fits: for a large model it takes gigabytes.
_cached: dict[tuple[tuple[ProjectionShape, ...], int], MeasuredLayer] = {}


def compile_batch(job: CompileJob) -> None:
    key = (job.projections, job.rank)
    if key not in _cached:
        _cached.clear()
        torch.cuda.empty_cache()
        _cached[key] = MeasuredLayer(
            job.projections, job.rank, job.slots, job.most_rows, device=torch.device("cuda", 0)
        )
    layer = _cached[key]
    layer.run("csgmv", plan_evenly(job.rows, job.adapters).with_tiles(layer.device), list(layer.loras))


def points(rows: Sequence[int], adapters: Sequence[int]) -> list[tuple[int, int]]:
    return [(t, n) for t in rows for n in adapters if t >= n]


def compile_batches(
    projections: Sequence[ProjectionShape], ranks: Sequence[int], rows_and_adapters: Sequence[tuple[int, int]],
    workers: int | None = None,
) -> None:  # fmt: skip
    most, slots = (max(numbers) for numbers in zip(*rows_and_adapters, strict=True))
    jobs = [CompileJob(tuple(projections), rank, *pair, slots, most) for rank in ranks for pair in rows_and_adapters]
    for _ in track(
        compile_all(compile_batch, jobs, workers=workers), "compiling", len(jobs), console=Console(stderr=True)
    ):
        pass


def times_ms(layer: MeasuredLayer, rows: int, adapters: int, scope: Scope, backends: Sequence[str]) -> dict[str, float]:
    batch = plan_evenly(rows, adapters).with_tiles(layer.device)
    return {name: wall_ms(partial(layer.run, name, batch, SCOPES[scope])) for name in backends}


def measure(
    projections: Sequence[ProjectionShape], ranks: Sequence[int], *, workers: int | None = None
) -> list[dict[str, Any]]:
    """Measure a model's crossovers for adapters of these ranks. Returns entries of a table file."""
    compile_batches(projections, ranks, points(ROWS, ADAPTERS), workers)
    entries = []
    for rank in ranks:
        layer = MeasuredLayer(projections, rank, max(ADAPTERS), max(ROWS), device=torch.device("cuda", 0))
        grid = [(t, n, scope) for t, n in points(ROWS, ADAPTERS) for scope in SCOPES]
        for t, n, scope in track(grid, f"backends at rank {rank}", console=Console(stderr=True)):
            ms: Mapping[str, float] = times_ms(layer, t, n, scope, ("base", *NAMES))
            entries.append(to_entry(Crossover(t, n, rank, layer.hidden, scope, ms)))
    crossovers.cache_clear()
    return entries
