"""Time that LoRA adds to the base projections, error of each backend, and the choices of dispatch.

Parts: few (4 adapters with long prompts), many (64 adapters), short (256 adapters of 16 rows), decode (256 requests of
one row, the four projections in one graph), plan (CPU time of the plan of a batch), error (against float32), grid (all
backends over many batches). Without a GPU, or with --tiny, the shapes are tiny and serve as a smoke test.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from time import perf_counter
from typing import Any

import torch
import triton
from torch import Tensor

from ranklet.kernels.batch import LoraBatch, cut, plan, plan_evenly
from ranklet.kernels.dispatch import NAMES
from ranklet.kernels.tuning.backends import SCOPES, MeasuredLayer, compile_batches, points
from ranklet.kernels.tuning.random_lora import (
    ProjectionShape,
    expanded,
    gpu_ms,
    graphed,
    projections,
    relative_error,
    shrunk,
)
from tests.bench import grid, report
from tests.bench.shapes import QWEN3_EMBEDDING_06B, decoder

TINY = decoder("Qwen3Model", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocab=64)
ROUNDS = 5
REP_MS = 20
ATTENTION, ALL = SCOPES["attention"], SCOPES["layer"]


@dataclass(frozen=True)
class Sizing:
    """Shapes, device and backends of a run."""

    projections: tuple[ProjectionShape, ...]
    device: torch.device
    dtype: torch.dtype
    backends: tuple[str, ...]
    divisor: int  # divides rows and adapters; the targets apply to 1

    def layer(self, rank: int, adapters: int, rows: int) -> MeasuredLayer:
        return MeasuredLayer(self.projections, rank, adapters, rows, device=self.device, dtype=self.dtype)

    def batch(self, rows: int, adapters: int) -> tuple[int, int]:
        """Return rows and adapters of a batch, scaled down by `divisor`."""
        adapters = max(1, adapters // self.divisor)
        return max(adapters, rows // self.divisor), adapters


def setting(*, tiny: bool) -> Sizing:
    """Return real shapes on a GPU and tiny ones on a CPU, with csgmv only where Triton interprets."""
    if torch.cuda.is_available() and not tiny:
        real = projections(QWEN3_EMBEDDING_06B.module_dims())
        return Sizing(real, torch.device("cuda", 0), torch.bfloat16, NAMES, 1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    runs = device.type == "cuda" or triton.knobs.runtime.interpret
    backends = tuple(name for name in NAMES if name != "csgmv" or runs)
    return Sizing(projections(TINY.module_dims()), device, torch.float16, backends, 64)


def added_ms(layer: MeasuredLayer, backend: str, batch: LoraBatch, names: Sequence[str]) -> tuple[float, float]:
    """Return milliseconds that LoRA adds and that the base takes: medians of interleaved rounds of CUDA graphs."""
    base, lora = (graphed(lambda name=name: layer.run(name, batch, names)) for name in ("base", backend))  # type: ignore[misc]
    rounds = [(gpu_ms(base, rep_ms=REP_MS), gpu_ms(lora, rep_ms=REP_MS)) for _ in range(ROUNDS)]
    return median(with_lora - without for without, with_lora in rounds), median(without for without, _ in rounds)


def row(part: str, what: str, measured: float, must: float | None, unit: str, base: float = 0.0) -> dict[str, Any]:
    reached = "" if must is None else "yes" if measured <= must else "no"
    return {
        "part": part, "what": what, "measured": measured, "must reach": must, "reached": reached, "unit": unit,
        "base": base or None,
    }  # fmt: skip


def few(on: Sizing) -> Iterator[dict[str, Any]]:
    """Measure every backend with few adapters and long prompts. The target applies to the fastest."""
    rows, adapters = on.batch(30_720, 4)
    layer, batch = on.layer(64, adapters, rows), plan_evenly(rows, adapters).with_tiles(on.device)
    found = {backend: added_ms(layer, backend, batch, ATTENTION) for backend in on.backends}
    best = min(found, key=lambda name: found[name][0])
    for backend, (added, base) in found.items():
        must = 0.12 if backend == best and on.divisor == 1 else None
        yield row("few", f"{adapters} x {rows // adapters} qkv + o, {backend}", added, must, "ms", base)


def many(on: Sizing) -> Iterator[dict[str, Any]]:
    targets = {"qkv": 0.18, "o": 0.085, "gate_up": 0.24, "down": 0.10}
    yield from _csgmv(on, "many", *on.batch(30_720, 64), targets)


def short(on: Sizing) -> Iterator[dict[str, Any]]:
    yield from _csgmv(on, "short", *on.batch(4096, 256), {"qkv": 0.08, "o": 0.045})


def _csgmv(on: Sizing, part: str, rows: int, adapters: int, targets: dict[str, float]) -> Iterator[dict[str, Any]]:
    layer, batch = on.layer(64, adapters, rows), plan_evenly(rows, adapters).with_tiles(on.device)
    for name, must in targets.items():
        added, base = added_ms(layer, _tiled(on), batch, (name,))
        what = f"{adapters} x {rows // adapters} {name}, {_tiled(on)}"
        yield row(part, what, added, must if on.divisor == 1 else None, "ms", base)


def decode(on: Sizing) -> Iterator[dict[str, Any]]:
    for count, must in ((32, 0.07), (8, 0.05)):
        rows, adapters = on.batch(256, count)
        layer, batch = on.layer(64, adapters, rows), plan_evenly(rows, adapters).with_tiles(on.device)
        added, base = added_ms(layer, _tiled(on), batch, ALL)
        what = f"{rows} x 1 of {adapters} adapters, all four, {_tiled(on)}"
        yield row("decode", what, added, must if on.divisor == 1 else None, "ms", base)


def _tiled(on: Sizing) -> str:
    return "csgmv" if "csgmv" in on.backends else on.backends[0]


def planning(on: Sizing) -> Iterator[dict[str, Any]]:
    for adapters in (1, 8, 32, 256):
        lengths, slots = [16] * 256, [i % adapters for i in range(256)]
        times = []
        for _ in range(300):
            began = perf_counter()
            cut(plan(lengths, slots)[1])
            times.append((perf_counter() - began) * 1e6)
        yield row("plan", f"256 requests, {adapters} adapters", median(times), 60.0, "us")


def error(on: Sizing) -> Iterator[dict[str, Any]]:
    """Compare each backend with float32, and backends with each other in units in the last place (ULP)."""
    lengths = [(1, 20, 50, 185)[i % 4] for i in range(64)]  # covers every tile height
    batch = plan(lengths, [None, *(i % 24 for i in range(1, 64))])[1].with_tiles(on.device)
    for rank in (8, 64):
        layer = on.layer(rank, 24, batch.rows)
        found = {backend: layer.run(backend, batch, ALL) for backend in on.backends}
        wanted = [_float32(layer, batch, name) for name in ALL]
        for backend, made in found.items():
            worst = max(relative_error(y, exact) for y, exact in zip(made, wanted, strict=True))
            yield row("error", f"{backend} of float32, rank {rank}", worst, 3e-3, "relative")
        for one, other in combinations(found, 2):
            ulps = [_ulps(a, b) for a, b in zip(found[one], found[other], strict=True)]
            what = f"{one} of {other}, rank {rank}"
            yield row("error", f"{what}, all but a thousandth", max(typical for typical, _ in ulps), 2.0, "ulps")
            yield row("error", f"{what}, the largest", max(largest for _, largest in ulps), 2.0, "ulps")


def _float32(layer: MeasuredLayer, batch: LoraBatch, name: str) -> Tensor:
    x, made = layer.input(name, batch.rows), layer.loras[name]
    y = x.float() @ made.weight.float().t()
    for s in batch.segments:
        y[s.start : s.stop] += expanded(shrunk(x, made.stack, s), made.stack, s.slot)
    return y


def _ulps(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the 99.9th percentile and the maximum of the difference in ULP. Outputs below 1 count as 1."""
    size = torch.maximum(a.abs(), b.abs()).float().clamp(min=1.0)
    ulp = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(a.dtype).eps
    off = ((a.float() - b.float()).abs() / ulp).flatten()
    return float(off.kthvalue(max(1, off.numel() * 999 // 1000)).values), float(off.max())


PARTS: dict[str, Callable[[Sizing], Iterator[dict[str, Any]]]] = {
    "few": few, "many": many, "short": short, "decode": decode, "plan": planning, "error": error,
}  # fmt: skip
BATCHES = {  # (rows, adapters) for which csgmv is compiled
    "few": [(30_720, 4)], "many": [(30_720, 64)], "short": [(4096, 256)], "decode": [(256, 32), (256, 8)],
    "error": [(4096, 24), (4096, 256)], "grid": points(grid.SIZES.rows, grid.SIZES.adapters),
}  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "kernels-h200")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "grid"], default=[*PARTS, "grid"], help="parts to run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="ranks of the grid")
    parser.add_argument("--scope", choices=SCOPES, default="layer", help="projections of the grid")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as without a GPU")
    options = parser.parse_args()
    on = setting(tiny=options.tiny)
    batches = sorted({batch for part in options.parts for batch in BATCHES.get(part, [])}, reverse=True)
    if on.divisor == 1 and batches:
        compile_batches(on.projections, sorted({64, *options.ranks}), batches)
    rows = [made for part in options.parts if part in PARTS for made in PARTS[part](on)]
    if rows:
        report.save(options.name, rows, options.out)
    if "grid" in options.parts:
        sizes = grid.SIZES if on.divisor == 1 else grid.TINY_SIZES
        grid.run(on.layer, on.backends, options.ranks, options.scope, sizes, options.out, f"{options.name}-grid")


if __name__ == "__main__":
    main()
