"""Rates of texts of many adapters, each with its own system prompt, on one engine without a server.

Some texts are in flight, each followed by another, for adapters by Zipf's law. A prompt is its adapter's system prompt
and some tokens of its own. In the first half of the requests, the system prompts come to the prefix cache.
"""

import argparse
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np

from ranklet.cluster.command.bench.prompts import uniform_lengths
from ranklet.kernels.mixes import assign
from ranklet.replicas.engine.engine import Engine
from tests.bench import report
from tests.bench.texts import (
    SHAPES,
    TextModel,
    TokenTimes,
    add_keep,
    greedy,
    make_text_model,
    model_folder,
    random_prompts,
    text_engine,
)


class TextsInFlight:
    """Keeps a number of texts in flight, until all requests are submitted and answered."""

    def __init__(self, engine: Engine, model: TextModel, options: argparse.Namespace, seed: int) -> None:
        self._engine = engine
        self._in_flight = options.in_flight
        self._finished = threading.Semaphore(self._in_flight)
        self._asked = self._requests(engine, model, options, seed)
        self.texts: list[TokenTimes] = []
        self.submitted_s: list[float] = []

    def _requests(self, engine: Engine, model: TextModel, options: argparse.Namespace, seed: int) -> Iterator[Any]:
        system = random_prompts(engine, len(model.adapters), options.system, seed)
        own = random_prompts(engine, options.requests, options.own, seed)
        drawn = assign("zipf:1", options.requests, len(model.adapters), seed=seed)
        rng = np.random.default_rng(seed)
        lengths = uniform_lengths(rng, options.output, options.output_range_ratio, options.requests)
        for index, end, length in zip(drawn, own, lengths, strict=True):
            yield np.concatenate([system[index], end]), model.adapters[index], greedy(length)

    def run(self) -> None:
        for prompt, adapter, params in self._asked:
            self._finished.acquire()
            text = TokenTimes(self._finished)
            self.texts.append(text)
            self.submitted_s.append(perf_counter())
            self._engine.submit([prompt], adapter, params, text)
        for _ in range(self._in_flight):  # until the last ones have ended
            self._finished.acquire()


def measured(engine: Engine, model: TextModel, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Return a row for each half of the requests."""
    flight = TextsInFlight(engine, model, options, seed)
    flight.run()
    ends_s = np.array([text.times_s[-1] for text in flight.texts])
    times_s = np.concatenate([text.times_s for text in flight.texts])
    begin_s, rows = flight.submitted_s[0], []
    halves = np.array_split(np.arange(len(flight.texts)), 2)
    for name, half in zip(("first", "second"), halves, strict=True):
        # A half lasts until as many texts have ended. The last texts, which run beside ever fewer, count in none.
        end_s = np.sort(ends_s)[min(half[-1], len(ends_s) - options.in_flight)]
        texts = [flight.texts[i] for i in half]
        firsts_ms = [1e3 * (flight.texts[i].times_s[0] - flight.submitted_s[i]) for i in half]
        prompts = len(half) * (options.system + options.own)
        rows.append({
            "half": name, "adapters": len(model.adapters), "in flight": options.in_flight,
            "tokens_per_s": round(((begin_s < times_s) & (times_s <= end_s)).sum() / (end_s - begin_s)),
            "first_p50_ms": float(np.percentile(firsts_ms, 50)), "first_p99_ms": float(np.percentile(firsts_ms, 99)),
            "gap_p50_ms": 1e3 * float(np.median(np.concatenate([np.diff(text.times_s) for text in texts]))),
            "cached share": sum(text.answer().result.cached_tokens for text in texts) / prompts,
        })  # fmt: skip
        begin_s = end_s
    return rows


def main() -> None:
    parser = report.parser(__doc__, "system-prompts-h200")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="0.6B", help="model")
    parser.add_argument("--adapters", type=int, default=64, help="number of adapters")
    parser.add_argument("--requests", type=int, default=2048, help="texts of a run")
    parser.add_argument("--in-flight", type=int, default=320, help="texts in flight")
    parser.add_argument("--running", type=int, default=256, help="texts that the engine runs at once; others wait")
    parser.add_argument("--system", type=int, default=2000, help="tokens of a system prompt")
    parser.add_argument("--own", type=int, default=32, help="further tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of the longest text")
    parser.add_argument(
        "--output-range-ratio", type=float, default=1.0, help="length of the shortest text / --output"
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=2, help="runs, after one that is not counted")
    add_keep(parser)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(options))
        model = make_text_model(folder, options.shapes, options.adapters)
        engine = stack.enter_context(text_engine(model, max_batch_requests=options.running))
        measured(engine, model, options, options.repeats)  # captures graphs
        rows = [
            {"run": seed + 1, **row}
            for seed in range(options.repeats)
            for row in measured(engine, model, options, seed)
        ]
        report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
