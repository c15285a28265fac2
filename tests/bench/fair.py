"""Latency of steady traffic while one other adapter is flooded.

The steady adapters get single prompts at Poisson times, together at a share of the engine's capacity, which is measured
first. The flood keeps as many requests queued as the engine accepts. Latency starts when a request is due, so a late
load generator counts against the engine.
"""

import argparse
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError, Saturated
from ranklet.replicas.process.process import EngineProcess
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model

_OTHERS = 16
_DEPTH = 64  # requests in flight while the capacity is measured
_FLOOD_PROMPTS = 4  # prompts in one request
_GIVE_UP_S = 60.0


class LoadSender:
    """Sends requests to an engine and counts refusals."""

    def __init__(self, engine: EngineProcess, tokens: int) -> None:
        self._engine = engine
        self._prompt = np.arange(1, tokens + 1, dtype=np.int32)
        self.refused = 0

    def send(self, adapter: AdapterRef, prompts: int, done: Callable[[Answer | RankletError], None]) -> None:
        self._engine.submit([self._prompt] * prompts, adapter, EmbedParams(), AnswerSink(done))

    def closed(self, adapters: Sequence[AdapterRef], depth: int, prompts: int, seconds: float) -> float:
        """Keep `depth` requests in flight. Returns prompts answered per second."""
        settled: SimpleQueue[Answer | RankletError] = SimpleQueue()
        began_s, answered, sent = time.perf_counter(), 0, 0
        for _ in range(depth):
            self.send(adapters[sent % len(adapters)], prompts, settled.put)
            sent += 1
        while (passed_s := time.perf_counter() - began_s) < seconds:
            result = settled.get(timeout=_GIVE_UP_S)
            if isinstance(result, RankletError):
                if not isinstance(result, Saturated):
                    raise result
                self.refused += 1
                time.sleep(0.01)
            else:
                answered += prompts
            self.send(adapters[sent % len(adapters)], prompts, settled.put)
            sent += 1
        for _ in range(depth):
            settled.get(timeout=_GIVE_UP_S)
        return answered / passed_s

    def steady(self, adapters: Sequence[AdapterRef], rate: float, seconds: float) -> list[float]:
        """Send `rate` requests per second. Returns latencies in seconds, without those of the first tenth."""
        draw, latencies, failed = random.Random(0), list[float](), list[RankletError]()
        left = threading.Semaphore(0)
        began_s = due_s = time.perf_counter()
        sent = 0
        while due_s < began_s + seconds:
            due_s += draw.expovariate(rate)
            time.sleep(max(0.0, due_s - time.perf_counter()))

            def done(result: Answer | RankletError, due_s: float = due_s) -> None:
                if isinstance(result, RankletError):
                    failed.append(result)
                elif due_s > began_s + seconds / 10:
                    latencies.append(time.perf_counter() - due_s)
                left.release()

            self.send(draw.choice(adapters), 1, done)
            sent += 1
        for _ in range(sent):
            if not left.acquire(timeout=_GIVE_UP_S):
                raise TimeoutError("the engine did not answer")
        if failed:
            raise failed[0]
        return latencies


def measure(
    engine: EngineProcess, options: argparse.Namespace, batch_tokens: int, adapters: Sequence[AdapterRef]
) -> list[dict[str, Any]]:
    flood, *others = adapters
    sender = LoadSender(engine, options.tokens)
    for adapter in adapters:
        engine.load(adapter)
    sender.closed(others, _DEPTH, 1, options.seconds / 6)  # warms the forecast up
    capacity = sender.closed(others, _DEPTH, 1, options.seconds / 3)
    rows = []
    depth = 4 * max(1, 4 * batch_tokens // options.tokens // _FLOOD_PROMPTS)
    rate: list[float] = []
    thread = threading.Thread(
        target=lambda: rate.append(sender.closed([flood], depth, _FLOOD_PROMPTS, options.seconds))
    )
    for flooded in (False, True):
        if flooded:
            thread.start()
            time.sleep(options.seconds / 30)
        latencies = np.array(sender.steady(others, options.load * capacity, options.seconds * 0.9)) * 1e3
        if flooded:
            thread.join()
        rows.append({
            "flood": flooded, "tokens": options.tokens, "batch_tokens": batch_tokens,
            "capacity_per_s": capacity, "load": options.load, "requests": len(latencies),
            "p50_ms": float(np.median(latencies)), "p99_ms": float(np.percentile(latencies, 99)),
            "flood_prompts_per_s": rate[0] if rate else 0.0, "flood_refused": sender.refused,
        })  # fmt: skip
    return [{**row, "p99_ratio": row["p99_ms"] / rows[0]["p99_ms"]} for row in rows]


def main() -> None:
    parser = report.parser(__doc__, "fair-h200" if torch.cuda.is_available() else "fair-cpu")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens of a prompt")
    parser.add_argument(
        "--batch-tokens", type=int, nargs="+", default=[32_768], help="max_batch_tokens of each measurement"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each measurement")
    parser.add_argument("--load", type=float, default=0.8, help="steady traffic's share of the capacity")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two CPU cores, one for the engine and one for this process
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", layers=options.layers)
        made = write_adapters(folder / "adapters", _OTHERS + 1, layers=options.layers)
        rows: list[dict[str, Any]] = []
        for batch_tokens in options.batch_tokens:
            engine = EngineProcess(EngineConfig(folder / "model", slots=_OTHERS + 1, max_batch_tokens=batch_tokens))
            try:
                Console(stderr=True).print(f"batches of {batch_tokens} tokens: starting the engine")
                engine.start()
                rows += measure(engine, options, batch_tokens, refs(made))
            finally:
                engine.stop()
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
