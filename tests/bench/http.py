"""Throughput over HTTP of one replica on one GPU behind gateways and HAProxy, measured with `ranklet bench`.

Run `python -m tests.bench.engine` with the same --out first to fill the column "of the engine alone".
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.result import BenchResult
from ranklet.cluster.command.bench.run import run_bench
from tests.bench import report
from tests.bench.cluster import samples, served
from tests.bench.shapes import QWEN3_EMBEDDING_06B

_BUSY = "ranklet_device_busy_seconds_total"


def plans(url: str, processes: int) -> dict[str, BenchPlan]:
    """Return the plan of each row. Requests are sent at once, except in the Poisson rows."""
    few, all_of_them = ("ad00[0-3]",), ("ad*",)
    long = BenchPlan(
        base_url=url, vocab=QWEN3_EMBEDDING_06B.vocab, processes=processes, num_prompts=120, input_len=6144,
        adapter_distribution="distinct", warmup=0,
    )  # fmt: skip
    short = dataclasses.replace(long, num_prompts=1200, input_len=512)
    texts = dataclasses.replace(long, num_prompts=20_000, input_len=128, range_ratio=0.125, batch_size=32)
    poisson = dataclasses.replace(long, adapters=few, request_rate=45.0)
    return {
        "120 x 6144, base": long,
        "120 x 6144, 4 adapters": dataclasses.replace(long, adapters=few),
        "120 x 6144, 64 adapters": dataclasses.replace(long, adapters=all_of_them),
        "1200 x 512, base": short,
        "1200 x 512, 4 adapters": dataclasses.replace(short, adapters=few),
        "1200 x 512, 64 adapters": dataclasses.replace(short, adapters=all_of_them),
        "20000 x 16-128, 32 a call, 64 adapters": dataclasses.replace(texts, adapters=all_of_them),
        "120 x 6144, 4 adapters, Poisson 45/s": poisson,
        "900 x 6144, 4 adapters, Poisson 45/s": dataclasses.replace(poisson, num_prompts=900),
    }


def device_busy_s(url: str) -> float:
    return sum(found[_BUSY] for found in samples(url, "replica").values())


def measured(url: str, plan: BenchPlan, repeats: int) -> Iterator[tuple[BenchResult, float]]:
    """Yield each run with the share of time for which the device computed."""
    for seed in range(repeats):
        before = device_busy_s(url)
        found = run_bench(dataclasses.replace(plan, seed=seed))
        yield found, (device_busy_s(url) - before) / found.seconds


def row(name: str, runs: list[tuple[BenchResult, float]], engine: dict[str, float]) -> dict[str, Any]:
    rates = sorted(round(found.overall.tokens_per_s) for found, _ in runs)
    alone = engine.get(name.split(" x ")[1].split(",")[0] + name.partition(",")[2].split(",")[0])
    last = runs[-1][0]
    return {
        "work": name, "tokens_per_s": median(rates), "runs": "/".join(map(str, rates)),
        "p50_ms": median(found.overall.p50_ms for found, _ in runs),
        "p99_ms": median(found.overall.p99_ms for found, _ in runs),
        "failed": sum(found.overall.requests - found.overall.answered for found, _ in runs),
        "device busy": median(share for _, share in runs),
        "of the engine alone": median(rates) / alone if alone and "Poisson" not in name else "",
        "client, busiest core": max(found.client.busiest for found, _ in runs),
        "client processes": last.client.processes,
    }  # fmt: skip


def engine_rates(path: Path) -> dict[str, float]:
    """Read the engine's tokens per second by "LENGTH N adapters". Empty if the engine was not measured."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    label = {0: " base"}
    return {
        r["prompts"].split(" x ")[1] + label.get(r["adapters"], f" {r['adapters']} adapters"): r["tokens_per_s"]
        for r in rows
    }


def main() -> None:
    parser = report.parser(__doc__, "http-h200")
    parser.add_argument("--gateways", type=int, default=8, help="number of gateways")
    parser.add_argument("--processes", type=int, default=4, help="processes of the load client")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; the median counts")
    parser.add_argument("--backend", default="auto", help="LoRA backend")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(
            Path(scratch), options.layers, 64, gateways=options.gateways, slots=64, backend=options.backend
        ) as running,
    ):  # fmt: skip
        url = running.state.base_url
        every = plans(url, options.processes)
        run_bench(dataclasses.replace(every["1200 x 512, 64 adapters"], num_prompts=512))  # loads the adapters
        engine = engine_rates(options.out / "engine-h200.json")
        work = {name: plan for name, plan in every.items() if options.only in name}
        rows = [
            row(name, list(measured(url, plan, options.repeats)), engine)
            for name, plan in track(work.items(), "measuring")
        ]
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
