"""Throughput of one engine with more adapters than slots.

A constant number of prompts is in flight, each for a random adapter; the default is that of one replica in
`tests.bench.cluster`. Every adapter is in host memory. `of all resident` is the rate by that of the last row
in which every adapter had a slot.
"""

import argparse
import statistics
import tempfile
import threading
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
from rich.progress import track

from ranklet.replicas.adapters.reference import AdapterRef, LoadRecord
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.engine.stats import BatchRecord, Listener
from ranklet.replicas.errors import RankletError
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.own_engine import own_engine
from tests.bench.shapes import ATTENTION, QWEN3_EMBEDDING_06B, write_adapters, write_model


class Watch(Listener):
    """Collects batches and loads since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.batches: list[BatchRecord] = []
        self.loads: list[LoadRecord] = []

    def batch(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def load(self, record: LoadRecord) -> None:
        self.loads.append(record)


class RandomTraffic:
    """Keeps `in_flight` prompts of one length in flight, for random adapters."""

    def __init__(self, engine: Engine, adapters: list[AdapterRef], tokens: int, in_flight: int) -> None:
        self._engine = engine
        self._adapters = adapters
        self._rng = np.random.default_rng(tokens)
        self._prompt = self._rng.integers(0, engine.limits.vocab, tokens, dtype=np.int32)
        self._free = threading.Semaphore(in_flight)
        self._in_flight = in_flight
        self._failed: RankletError | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "RandomTraffic":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the last answer. Raises the error of a failed request."""
        self._over = True
        self._thread.join()
        for _ in range(self._in_flight):
            self._free.acquire()
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        while not self._over:
            self._free.acquire()
            adapter = self._adapters[int(self._rng.integers(len(self._adapters)))]
            self._engine.submit([self._prompt], adapter, EmbedParams(), AnswerSink(self._done))

    def _done(self, answer: Answer | RankletError) -> None:
        if isinstance(answer, RankletError):
            self._failed = answer
        self._free.release()


def measured(engine: Engine, watch: Watch, adapters: list[AdapterRef], options: argparse.Namespace) -> dict[str, Any]:
    with RandomTraffic(engine, adapters, options.tokens, options.in_flight):
        sleep(options.settle)
        watch.clear()
        began_s = perf_counter()
        sleep(options.seconds)
        seconds, batches, loads = perf_counter() - began_s, list(watch.batches), list(watch.loads)
    return {
        "adapters": len(adapters), "slots": options.slots, "tokens": options.tokens, "in flight": options.in_flight,
        "tokens_per_s": sum(batch.tokens for batch in batches) / seconds,
        "device busy": sum(batch.compute_s for batch in batches) / seconds,
        "batch_tokens": statistics.mean(batch.tokens for batch in batches),
        "loads_per_s": len(loads) / seconds,
        "load_ms": statistics.median(load.seconds for load in loads) * 1e3 if loads else 0.0,
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "thrash-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[64, 128, 64, 128, 64, 128, 64, 128, 64, 128], help="of each row"
    )
    parser.add_argument("--slots", type=int, default=64, help="adapter slots of the engine")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--in-flight", type=int, default=800, help="prompts in flight")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds before the measurement starts")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement")
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        made = refs(write_adapters(folder / "adapters", max(options.adapters), layers=options.layers))
        config = EngineConfig(
            model_dir=model, slots=options.slots, max_batch_tokens=30_720, max_rank=64, lora_modules=ATTENTION,
            host_cache_bytes=16 << 30,
        )  # fmt: skip
        with own_engine(config, watch) as engine:
            for ref in track(reversed(made), description="loading adapters", total=len(made)):
                engine.load(ref)
            rows = list[dict[str, Any]]()
            for count in track(options.adapters):
                rows.append(measured(engine, watch, made[:count], options))
                resident = [row["tokens_per_s"] for row in rows if row["adapters"] <= options.slots]
                rows[-1]["of all resident"] = rows[-1]["tokens_per_s"] / resident[-1] if resident else ""
                report.write(options.name, rows, options.out)  # a run that is cut off leaves some
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
