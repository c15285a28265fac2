"""Compare the backend that dispatch chooses with the fastest one, over a grid of batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

from ranklet.kernels.batch import plan_evenly
from ranklet.kernels.cost_model import LoraLayer
from ranklet.kernels.crossover import Scope, crossovers, surface
from ranklet.kernels.dispatch import Backends
from ranklet.kernels.stack import padded_rank
from ranklet.kernels.tuning.backends import SCOPES, MeasuredLayer, points, times_ms
from tests.bench import plot, report

CLOSE = 0.03  # time a choice again that is further from the best, in case of noise
ROUNDS = 3


@dataclass(frozen=True)
class Sizes:
    adapters: tuple[int, ...]
    rows: tuple[int, ...]


SIZES = Sizes((1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 16, 64, 256, 1024, 4096, 12_288, 30_720))
TINY_SIZES = Sizes((1, 4), (1, 16, 64))


def picked(layer: MeasuredLayer, rows: int, adapters: int, scope: Scope) -> str:
    projections = tuple((p.wide, p.widths) for p in (layer.loras[name].projection for name in SCOPES[scope]))
    known = surface(crossovers(layer.device.index), scope, layer.hidden)
    lora = LoraLayer(projections, padded_rank(layer.rank), layer.device.type == "cuda", known)
    return Backends(lora).choose(plan_evenly(rows, adapters), "fastest").backend


def measured(layer: MeasuredLayer, rows: int, adapters: int, scope: Scope, backends: Sequence[str]) -> dict[str, Any]:
    ms = times_ms(layer, rows, adapters, scope, backends)
    pick = picked(layer, rows, adapters, scope)
    if ms[pick] > min(ms.values()) * (1 + CLOSE):
        again = [times_ms(layer, rows, adapters, scope, backends) for _ in range(ROUNDS)]
        ms = {name: median(times[name] for times in again) for name in backends}
    best = min(ms, key=ms.__getitem__)
    return {
        "rank": layer.rank, "adapters": adapters, "rows": rows, **{f"{name}_ms": ms[name] for name in backends},
        "pick": pick, "best": best, "behind_percent": 100 * (ms[pick] / ms[best] - 1),
    }  # fmt: skip


def run(
    make: Callable[[int, int, int], MeasuredLayer], backends: Sequence[str], ranks: Sequence[int], scope: Scope,
    sizes: Sizes,
    out: Path, name: str,
) -> None:  # fmt: skip
    """Measure the grid, save and print it, and draw it where matplotlib is installed.

    Args:
        make: returns a layer for (rank, adapters, rows).
    """
    rows: list[dict[str, Any]] = []
    batches = points(sizes.rows, sizes.adapters)
    for rank in ranks:
        layer = make(rank, max(sizes.adapters), max(sizes.rows))
        for t, n in track(batches, f"{' + '.join(SCOPES[scope])} at rank {rank}", console=Console(stderr=True)):
            rows.append(measured(layer, t, n, scope, backends))
    path = report.save(name, rows, out)
    behind = [found["behind_percent"] for found in rows]
    within = sum(percent <= 5 for percent in behind)
    print(f"{within} of {len(rows)} choices within 5 % of the best; the worst is {max(behind):.1f} % behind")
    plot.draw(path)
