"""Generated text over HTTP: HAProxy, gateways and one replica, beside the engine alone in the same run.

Weights, adapters and works are those of `tests.bench.generate`. Every answer is streamed. Three parts:

- rates: all requests at once, of which the engine runs 256 at the same time. The best of some runs counts. CPU times
  are microseconds a token, and the busiest process's share of a core.
- first: what HTTP, Ray and gateways add to the time to the first token: the client's time minus the engine's own time
  for the same request. One request at a time, and at 80 % of the rate of the engine alone.
- gaps: times between the tokens of one text.
"""

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.requests import make_requests
from ranklet.cluster.command.bench.result import BenchResult
from ranklet.cluster.command.bench.run import run_bench
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.cluster.command.bench.text_result import TextNumbers
from ranklet.cluster.command.json_client import fetch_json
from tests.bench import report
from tests.bench.cluster import Served, configuration, running, scaled
from tests.bench.cpu import CpuTimes, PartCpu, cpu_times, used
from tests.bench.first_tokens import FirstToken, first_tokens
from tests.bench.generate import TextWork, best
from tests.bench.haproxy import servers_up
from tests.bench.http import device_busy_s
from tests.bench.texts import (
    RANK,
    SHAPES,
    TextModel,
    add_keep,
    make_text_model,
    model_folder,
    random_prompts,
    run_texts,
    text_engine,
)
from tests.bench.vocabulary import save_full_tokenizer

PARTS = ("rates", "first", "gaps")
ADAPTERS = 32
LOAD = 0.8  # of the engine's rate
MUST_RATIO, MUST_ALONE_MS, MUST_LOADED_MS, MUST_GAP_MS = 0.92, 6.0, 25.0, 0.3
WORKS = (TextWork(512, 512, 256, ()), TextWork(256, 32, 512, ()))
ONE = TextWork(1, 512, 256, ())
TINY_WORKS = (TextWork(24, 20, 64, ()), TextWork(12, 4, 128, ()))
TINY_ONE = TextWork(1, 20, 64, ())
_FIRST_OUTPUT = 16  # tokens of texts of which only the first counts
_WARM_UP_OUTPUT = 8
_PROCESSES = ("gateway", "actor", "engine", "haproxy")
_LOGS_AT_ONCE = {"RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}


class EngineNumbers(NamedTuple):
    """The engine alone."""

    rates: dict[TextWork, float]
    first_ms: float
    gap_ms: float


class Runs(NamedTuple):
    """Runs of one plan."""

    found: list[BenchResult]
    cpu: dict[str, PartCpu]
    busy: float  # the device's share of time

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.found)

    @property
    def errors(self) -> dict[str, int]:
        return dict(sum((Counter(each.overall.errors) for each in self.found), Counter[str]()))

    def texts(self) -> list[TextNumbers]:
        return [each.overall.text for each in self.found if each.overall.text]


def engine_settings(model: TextModel) -> dict[str, Any]:
    return {"slots": len(model.adapters), "max_rank": RANK, "max_batch_requests": 256, "prefix_cache": False}


def engine_alone(
    model: TextModel, works: Sequence[TextWork], one: TextWork, options: argparse.Namespace
) -> EngineNumbers:
    with text_engine(model, **engine_settings(model)) as engine:
        rates = {work: best(engine, model, work, ADAPTERS, options.repeats).tokens_per_s for work in works}
        text = best(engine, model, one, 1, options.repeats)
        first_ms = [
            float(run_texts(engine, [prompt], [model.adapters[i % ADAPTERS]], _FIRST_OUTPUT).first_ms()[0])
            for i, prompt in enumerate(random_prompts(engine, options.first, one.prompt))
        ]
    return EngineNumbers(rates, median(first_ms), float(np.median(text.gaps_ms())))


def plan_of(url: str, work: TextWork, model: TextModel, processes: int) -> BenchPlan:
    return BenchPlan(
        base_url=url, text=TextPlan(output_len=work.output, ignore_eos=True), adapters=("ad*",),
        adapter_distribution="distinct", input_len=work.prompt, vocab=model.shape.vocab, num_prompts=work.requests,
        warmup=0, processes=processes,
    )  # fmt: skip


def measured(cluster: Served, plan: BenchPlan, repeats: int) -> Runs:
    """Run a plan some times, after a short run that is not counted."""
    assert plan.text is not None
    run_bench(dataclasses.replace(plan, text=dataclasses.replace(plan.text, output_len=_WARM_UP_OUTPUT)))
    busy_s, before = device_busy_s(cluster.state.base_url), cpu(cluster)
    found = [run_bench(dataclasses.replace(plan, seed=seed)) for seed in range(repeats)]
    after, busy_s = cpu(cluster), device_busy_s(cluster.state.base_url) - busy_s
    return Runs(found, used(before, after), busy_s / sum(each.seconds for each in found))


def cpu(cluster: Served) -> CpuTimes:
    return cpu_times(cluster.state.pid)


def rate_row(work: TextWork, gateways: int, runs: Runs, engine: EngineNumbers) -> dict[str, Any]:
    texts = runs.texts()
    rates, tokens = sorted(text.output_tokens_per_s for text in texts), sum(text.output_tokens for text in texts)
    row = {
        "work": str(work), "adapters": ADAPTERS, "gateways": gateways, "tokens_per_s": round(rates[-1]),
        "runs": "/".join(f"{rate:.0f}" for rate in rates), "engine tokens_per_s": round(engine.rates[work]),
        "of the engine": rates[-1] / engine.rates[work], "must": MUST_RATIO, "failed": runs.errors,
        "device busy": runs.busy, "first_p50_ms": median(text.ttft_p50_ms for text in texts),
        "gap_p50_ms": median(text.gap_p50_ms for text in texts), "tokens a read": texts[-1].tokens_per_gap,
    }  # fmt: skip
    for name in _PROCESSES:
        share = runs.cpu[name]
        row |= {f"{name} us": share.seconds / tokens * 1e6, f"{name} busiest": share.busiest_s / runs.seconds}
    client = runs.found[-1].client
    return row | {
        "client us": client.cpu_us_per_frame, "client busiest": client.busiest, "client processes": client.processes,
    }  # fmt: skip


def first_row(
    load: str, work: TextWork, gateways: int, times: Sequence[FirstToken], failed: int, must: str
) -> dict[str, Any]:
    client, gateway, engine = np.array(times).T
    row: dict[str, Any] = {"load": load, "work": str(work), "gateways": gateways, "failed": failed}
    for name, values in (
        ("client", client), ("engine", engine), ("added", client - engine), ("added at the gateway", gateway - engine),
    ):  # fmt: skip
        row |= {f"{name} p{percent}_ms": float(np.percentile(values, percent)) for percent in (50, 90, 99)}
    return row | {"must": must}


def gap_row(work: TextWork, gateways: int, runs: Runs, engine: EngineNumbers) -> dict[str, Any]:
    texts = runs.texts()
    gap_ms = median(text.gap_p50_ms for text in texts)
    return {
        "work": str(work), "gateways": gateways, "gap_p50_ms": gap_ms, "engine gap_p50_ms": engine.gap_ms,
        "added ms": gap_ms - engine.gap_ms, "must": MUST_GAP_MS, "failed": runs.errors,
        "gap_p99_ms": median(text.gap_p99_ms for text in texts),
        "ms a token": median(text.tpot_p50_ms for text in texts),
        "tokens a read": max(text.tokens_per_gap for text in texts),
    }  # fmt: skip


def rows_of(
    cluster: Served, model: TextModel, works: Sequence[TextWork], one: TextWork, engine: EngineNumbers,
    options: argparse.Namespace,
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Yield rows with their parts."""
    url = cluster.state.base_url

    def plan(work: TextWork, **fields: Any) -> BenchPlan:
        return dataclasses.replace(plan_of(url, work, model, options.processes), **fields)

    def logs() -> list[Path]:
        return list(cluster.cluster.state.logs.glob("replica_*Gateway*"))

    run_bench(plan(one, num_prompts=2 * ADAPTERS, max_concurrency=4))  # loads the adapters
    for gateways in options.gateways:
        if gateways != options.gateways[0]:
            scaled(cluster, "Gateway", gateways)
        while servers_up(Path(cluster.state.temp_dir)) != gateways:
            time.sleep(0.1)
        for work in works:
            yield "rates", rate_row(work, gateways, measured(cluster, plan(work), options.repeats), engine)
        short = one._replace(output=_FIRST_OUTPUT)
        requests = make_requests(plan(short, num_prompts=options.first), "", cluster.adapters)
        times, failed = first_tokens(url, requests, logs, alone=True)
        row = first_row("one at a time", short, gateways, times, failed, f"p50 {MUST_ALONE_MS:g}")
        yield "first", row | {"engine alone p50_ms": engine.first_ms}
        one_by_one = plan(one, num_prompts=options.texts, max_concurrency=1)
        yield "gaps", gap_row(one, gateways, measured(cluster, one_by_one, options.repeats), engine)
        per_s = LOAD * engine.rates[works[0]] / works[0].output
        poisson = plan(works[0], num_prompts=round(options.seconds * per_s), request_rate=per_s)
        times, failed = first_tokens(url, make_requests(poisson, "", cluster.adapters), logs, alone=False)
        load = f"{LOAD:.0%}, {per_s:.0f} requests/s"
        row = first_row(load, works[0], gateways, times, failed, f"p99 {MUST_LOADED_MS:g}")
        yield "first", row | {"engine alone p50_ms": None}


def main() -> None:
    parser = report.parser(__doc__, "text-http-h200")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="0.6B", help="model")
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of gateways, ascending")
    parser.add_argument("--processes", type=int, default=4, help="processes of the load client")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--first", type=int, default=100, help="requests sent one at a time")
    parser.add_argument("--texts", type=int, default=4, help="texts of the part `gaps`")
    parser.add_argument("--seconds", type=float, default=15.0, help="time of the part `first` under load")
    add_keep(parser)
    options = parser.parse_args()
    works, one = (TINY_WORKS, TINY_ONE) if options.shapes == "tiny" else (WORKS, ONE)
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(options))
        model = make_text_model(folder, options.shapes, ADAPTERS)
        save_full_tokenizer(model.folder, model.shape.vocab)
        with ProcessPoolExecutor(1, get_context("spawn")) as own_process:  # its end frees all memory of the device
            engine = own_process.submit(engine_alone, model, works, one, options).result()
        print(engine, flush=True)
        content = configuration(model.folder.parent, 1, options.gateways[0], engine_settings(model))
        content["applications"][0]["args"]["log"] = {"requests": "all"}
        cluster = stack.enter_context(running(model.folder.parent, content, _LOGS_AT_ONCE))
        for part, row in rows_of(cluster, model, works, one, engine, options):
            print(part, row, flush=True)
            rows[part].append(row)
            if row["failed"]:
                print(fetch_json(f"{cluster.state.base_url}/v1/status", timeout_s=30)["errors"], flush=True)
    for part, found in rows.items():
        report.save(options.name if part == "rates" else f"{options.name}-{part}", found, options.out)


if __name__ == "__main__":
    main()
