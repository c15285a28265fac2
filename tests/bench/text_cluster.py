"""Generated text by two GPUs behind one app, relative to one, measured with `ranklet bench`.

Weights and adapters are those of `tests.bench.generate`. Each work is measured with all replicas and then with one:

- texts with their adapters in turn, alone and beside batches of embeddings
- one adapter of 64 with 61 % of the texts
- more adapters than the slots of a replica
- prompts with a common beginning: the share of it that came from the caches, relative to one cache of any size, which
  computes it once for each adapter

Beside each rate are the busy and stolen cores of the machine, and how much of a core the busiest engine used. GPUs that
wait for a busy or slow host are less busy.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from ranklet.cluster.command.bench.plan import BenchPlan
from ranklet.cluster.command.bench.result import BenchResult
from ranklet.cluster.command.bench.run import run_bench
from ranklet.cluster.command.bench.text_plan import TextPlan
from ranklet.cluster.command.bench.text_result import TextNumbers
from ranklet.replicas.cache.pages import PAGE_TOKENS
from tests.bench import report
from tests.bench.cluster import Served, configuration, growth, running, samples, scaled, slot_hit_rate
from tests.bench.cpu import cpu_times, machine_cpu, used
from tests.bench.texts import RANK, SHAPES, add_keep, make_text_model, model_folder
from tests.bench.vocabulary import save_full_tokenizer

ADAPTERS, SLOTS = 64, 64
_BUSY = "ranklet_device_busy_seconds_total"


class TextsBeside(NamedTuple):
    """Texts, and embeddings beside them.

    Attributes:
        against: work whose rate this one is compared with, or "".
    """

    name: str
    texts: BenchPlan
    embeddings: BenchPlan | None = None
    against: str = ""


def works(url: str, names: list[str], replicas: int, options: argparse.Namespace) -> list[TextsBeside]:
    scale = replicas * options.texts
    few, every = tuple(names[:ADAPTERS]), tuple(names)
    lengths = {"output_len": options.output, "output_range_ratio": options.output_range_ratio}
    texts = BenchPlan(
        base_url=url, text=TextPlan(**lengths, ignore_eos=True), adapters=few, vocab=options.vocab,
        adapter_distribution="distinct", input_len=options.prompt, num_prompts=scale, warmup=0,
        max_concurrency=options.at_once * replicas, processes=options.processes,
    )  # fmt: skip
    embeddings = BenchPlan(
        base_url=url, adapters=few, vocab=options.vocab, adapter_distribution="distinct", input_len=options.prompt,
        num_prompts=scale // 2, warmup=0, max_concurrency=8 * replicas, processes=2,
    )  # fmt: skip
    common = TextPlan(output_len=options.output // 4, ignore_eos=True, common_prompt_tokens=options.common)
    shared = dataclasses.replace(texts, text=common, input_len=32, adapter_distribution="zipf:1")
    found = [
        TextsBeside("texts", texts),
        TextsBeside("texts and embeddings", texts, embeddings),
        TextsBeside("one adapter has 61 %", dataclasses.replace(texts, adapter_distribution="zipf:2"), None, "texts"),
        TextsBeside("common beginnings", shared),
    ]
    if len(every) > ADAPTERS and replicas > 1:
        more = dataclasses.replace(texts, adapters=every)
        found.append(TextsBeside(f"{len(every)} adapters", more, None, "texts"))
    return [work for work in found if not options.works or work.name in options.works]


def run(work: TextsBeside, seed: int) -> tuple[BenchResult, BenchResult | None]:
    """Run texts and embeddings at the same time."""
    with ThreadPoolExecutor(2) as both:
        texts = both.submit(run_bench, dataclasses.replace(work.texts, seed=seed))
        beside = both.submit(run_bench, dataclasses.replace(work.embeddings, seed=seed)) if work.embeddings else None
        return texts.result(), beside.result() if beside else None


def measured(cluster: Served, work: TextsBeside, replicas: int, repeats: int) -> dict[str, Any]:
    """Return a row: the median rate of some runs after one that is not counted."""
    first_seed = replicas * (repeats + 1)  # prompts are new, also those of the caches
    run(work, first_seed + repeats)
    before = samples(cluster.state.base_url, "replica")
    began_s, machine, processes = perf_counter(), machine_cpu(), cpu_times(cluster.state.pid)
    found = [run(work, first_seed + i) for i in range(repeats)]
    engines = used(processes, cpu_times(cluster.state.pid))["engine"]
    taken_s = perf_counter() - began_s
    busy_s, stolen_s = np.subtract(machine_cpu(), machine).tolist()
    grown = growth(before, samples(cluster.state.base_url, "replica"))
    texts = [text for text, _ in found]
    numbers = [text.overall.text for text in texts if text.overall.text]
    seconds = sum(max(text.seconds, beside.seconds if beside else 0) for text, beside in found)
    busy = [each[_BUSY] / seconds for each in grown.values()]
    vectors = [beside.overall.tokens_per_s for _, beside in found if beside]
    row: dict[str, Any] = {
        "replicas": replicas, "work": work.name,
        "tokens_per_s": round(median(each.output_tokens_per_s for each in numbers)),
        "settled tokens_per_s": round(median(map(settled_rate, texts))),
        "runs": "/".join(f"{each.output_tokens_per_s:.0f}" for each in numbers),
        "embedding tokens_per_s": round(median(vectors)) if vectors else "",
        "first_p50_ms": median(each.ttft_p50_ms for each in numbers),
        "gap_p50_ms": median(each.gap_p50_ms for each in numbers),
        "failed": failures(one for pair in found for one in pair if one),
        "least busy": min(busy), "busiest": max(busy), "found on the device": slot_hit_rate(grown),
        "busiest engine": engines.busiest_s / taken_s, "busy cores": busy_s / taken_s,
        "stolen cores": stolen_s / taken_s,
    }  # fmt: skip
    common = work.texts.text.common_prompt_tokens if work.texts.text else 0
    row["of one cache"] = cached_share(numbers, texts, common) if common else ""
    return row


def settled_rate(result: BenchResult) -> float:
    """Return the tokens per second of the middle half of a run, in which no replica lacks texts.

    The tokens of a text count as spread evenly over its time.
    """
    ends_s, latencies_s = result.answers.T
    begin_s, end_s = result.seconds / 4, result.seconds * 3 / 4
    inside_s = np.minimum(ends_s, end_s) - np.maximum(ends_s - latencies_s, begin_s)
    return float((result.tokens * np.maximum(inside_s, 0.0) / latencies_s).sum() / (end_s - begin_s))


def failures(results: Iterable[BenchResult]) -> str:
    """Return how many requests failed, by error."""
    errors = Counter[str]()
    for result in results:
        errors.update(result.overall.errors)
    return ", ".join(f"{count} x {error}" for error, count in errors.items())


def cached_share(numbers: Sequence[TextNumbers], texts: Sequence[BenchResult], common: int) -> float:
    """Return the tokens from the caches, of those that one cache of any size would have."""
    cached = sum(each.cached_tokens for each in numbers)
    computed_once = sum(len(result.by_adapter) for result in texts)
    found = sum(result.overall.answered for result in texts) - computed_once
    return cached / (found * (common // PAGE_TOKENS * PAGE_TOKENS))


def rows_of(cluster: Served, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    url, rates, settled_rates = cluster.state.base_url, dict[tuple[int, str], int](), dict[tuple[int, str], int]()
    for replicas in (options.replicas, 1):
        if replicas == 1:
            scaled(cluster, "Replica", 1)
        for work in works(url, cluster.adapters, replicas, options):
            row = measured(cluster, work, replicas, options.repeats)
            rate = rates[replicas, work.name] = row["tokens_per_s"]
            row["of one replica"] = rates[options.replicas, work.name] / rate if replicas == 1 else ""
            settled = settled_rates[replicas, work.name] = row["settled tokens_per_s"]
            row["settled of one replica"] = (
                settled_rates[options.replicas, work.name] / settled if replicas == 1 else ""
            )
            against = rates.get((replicas, work.against))
            row["of texts"] = rate / against if against else ""
            print(row, flush=True)
            yield row


def main() -> None:
    parser = report.parser(__doc__, "text-cluster-2xh200")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="0.6B", help="model")
    parser.add_argument("--works", nargs="+", metavar="WORK", help="works to measure, by name; all by default")
    parser.add_argument("--replicas", type=int, default=max(torch.cuda.device_count(), 2), help="number of replicas")
    parser.add_argument("--gateways", type=int, default=8, help="number of gateways")
    parser.add_argument("--adapters", type=int, default=128, help="number of adapters")
    parser.add_argument("--processes", type=int, default=4, help="processes of the load client")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each work; the median counts")
    parser.add_argument("--texts", type=int, default=1024, help="texts of a run for each replica")
    parser.add_argument("--at-once", type=int, default=320, help="texts in flight for each replica")
    parser.add_argument("--running", type=int, default=256, help="texts that a replica runs at once; others wait")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens of the longest text")
    parser.add_argument(
        "--output-range-ratio", type=float, default=1.0,
        help="length of the shortest text / --output. With 1, texts of one replica end in waves",
    )  # fmt: skip
    parser.add_argument("--common", type=int, default=2000, help="tokens of the common beginning")
    add_keep(parser)
    options = parser.parse_args()
    options.vocab = SHAPES[options.shapes].vocab
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(options))
        model = make_text_model(folder, options.shapes, options.adapters)
        save_full_tokenizer(model.folder, options.vocab)
        engine = {"slots": SLOTS, "max_rank": RANK, "max_batch_requests": options.running}
        content = configuration(model.folder.parent, options.replicas, options.gateways, engine)
        cluster = stack.enter_context(running(model.folder.parent, content))
        rows = list[dict[str, Any]]()
        for row in rows_of(cluster, options):
            rows.append(row)
            report.write(options.name, rows, options.out)  # a run that is cut off leaves some
        report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
