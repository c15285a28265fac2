"""Cost of rounding batches up to a bucket, CPU time saved by CUDA graphs, and how often random batches hit a graph."""

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.layout import whole_prompts
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model

_BATCHES = ("1x16", "1x300", "1x520", "1x1100", "4x200", "5x60", "9x100", "33x30", "20x100", "5x500", "9x500", "7x1100")
_GRAPHED = 3  # launches before a graph exists
_REPEATS = 20


def fixed(engine: Engine, batch: str, slots: list[int | None]) -> dict[str, Any]:
    """Time one batch launched kernel by kernel, from a graph of its exact lengths, and from its bucket's graph."""
    count, length = map(int, batch.split("x"))
    prompts = [np.full(length, i, dtype=np.int32) for i in range(count)]
    used = [slots[i % len(slots)] for i in range(count)]
    row: dict[str, Any] = {"batch": batch, "adapters": sum(slot is not None for slot in slots)}
    runner = engine.runner
    cache, pads = runner.graphs, runner.pads
    assert cache is not None
    for mode, graphs, padded in (("launched", None, False), ("exact", cache, False), ("bucket", cache, pads)):
        runner.graphs, runner.pads = graphs, padded
        for _ in range(_GRAPHED):
            runner.launch(whole_prompts(prompts, engine.heads.base), used).wait()
        steps, took_s = [], []
        for _ in range(_REPEATS):
            start_s = perf_counter()
            step = runner.launch(whole_prompts(prompts, engine.heads.base), used)
            step.wait()
            took_s.append(perf_counter() - start_s)
            steps.append(step)
        row[f"{mode}_ms"] = round(median(took_s) * 1e3, 3)
        row[f"{mode}_device_ms"] = round(median(step.device_s() for step in steps) * 1e3, 3)
    runner.graphs, runner.pads = cache, pads
    return row


def traffic(engine: Engine, slots: list[int | None], turns: int, max_prompts: int, *, graphs: bool) -> dict[str, Any]:
    """Time random batches one at a time, and measure the device memory reserved while they run."""
    runner = engine.runner
    rng, cache, pads = np.random.default_rng(max_prompts), runner.graphs, runner.pads
    assert cache is not None
    cache.clear()
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved()
    took_s, capture_s = [], []
    for _ in range(turns):
        lengths = np.clip(rng.lognormal(np.log(200), 0.8, rng.integers(1, max_prompts + 1)), 1, 2000).astype(int)
        lengths = lengths[: max(1, int((lengths.cumsum() <= 8192).sum()))]
        prompts = [rng.integers(0, 1000, length, dtype=np.int32) for length in lengths]
        used = [slots[int(rng.integers(len(slots)))] for _ in prompts]
        runner.graphs, runner.pads = cache if graphs else None, pads and graphs
        before, start_s = len(cache), perf_counter()
        step = runner.launch(whole_prompts(prompts, engine.heads.base), used)
        step.wait()
        took_s.append(perf_counter() - start_s)
        if len(cache) > before:
            capture_s.append(step.launch_s)
    runner.graphs, runner.pads, late_s = cache, pads, sorted(took_s[turns // 2 :])
    return {
        "batch": f"up to {max_prompts} prompts", "graphs": len(cache) if graphs else 0,
        "ms": round(sum(took_s) / turns * 1e3, 3), "later_ms": round(sum(late_s) / len(late_s) * 1e3, 3),
        "later_p50_ms": round(median(late_s) * 1e3, 3), "later_p99_ms": round(late_s[len(late_s) * 99 // 100] * 1e3, 3),
        "capture_ms": round(median(capture_s) * 1e3, 3) if capture_s else "",
        "reserved_mib": (torch.cuda.memory_reserved() - before_bytes) >> 20,
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "buckets-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--turns", type=int, default=1500, help="random batches of each row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        made = refs(write_adapters(folder / "adapters", 8, layers=options.layers))
        engine = Engine(EngineConfig(model, slots=8, lora_modules=ATTENTION))
        engine.start()
        try:
            for adapter in made:
                engine.load(adapter)
        finally:
            engine.stop()
        base: list[int | None] = [None]
        slots = [engine.slot_of(adapter) for adapter in made]
        batches = [fixed(engine, batch, used) for used in (base, slots) for batch in _BATCHES]
        mixed = [
            traffic(engine, [*base, *slots], options.turns, max_prompts, graphs=graphs)
            for max_prompts in (1, 8, 32)
            for graphs in (False, True)
        ]
    report.save(f"{options.name}-fixed", batches, options.out)
    report.save(f"{options.name}-traffic", mixed, options.out)


if __name__ == "__main__":
    main()
