"""Throughput of the engine without a server on one GPU, and latency of one prompt at a time."""

import tempfile
import threading
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import track

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.engine.request import Answer, AnswerSink
from ranklet.replicas.errors import RankletError
from tests.bench import report
from tests.bench.own_engine import own_engine
from tests.bench.shapes import QWEN3_EMBEDDING_06B, write_adapters, write_model

_WARM, _ALONE = 8, 200
LENGTHS = {6144: 5, 512: 60, 128: 240}  # prompts of this length that fill one batch of 30,720 tokens


def refs(paths: list[Path]) -> list[AdapterRef]:
    return [Revisions().reference(path.name, str(path)) for path in paths]


def embed(engine: Engine, prompts: list[np.ndarray], adapters: list[AdapterRef | None]) -> list[Answer]:
    """Submit each prompt as its own request, all at once, and wait for every answer."""
    answers: list[Any] = [None] * len(prompts)
    left = threading.Semaphore(0)

    def finish(i: int, answer: Answer | RankletError) -> None:
        answers[i] = answer
        left.release()

    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine.submit([prompt], adapter, EmbedParams(), AnswerSink(partial(finish, i)))
    for _ in prompts:
        left.acquire()
    failed = [answer for answer in answers if isinstance(answer, RankletError)]
    if failed:
        raise failed[0]
    return answers


def throughput(engine: Engine, adapters: list[AdapterRef | None], length: int, batches: int) -> dict[str, Any]:
    rng = np.random.default_rng(length)
    count = LENGTHS[length] * batches
    prompts = [rng.integers(0, engine.limits.vocab, length, dtype=np.int32) for _ in range(count)]
    chosen = [adapters[i % len(adapters)] for i in range(count)]
    embed(engine, prompts[: LENGTHS[length] * 2], chosen[: LENGTHS[length] * 2])
    began = perf_counter()
    answers = embed(engine, prompts, chosen)
    seconds = perf_counter() - began
    return {
        "prompts": f"{count} x {length}", "adapters": len({a for a in chosen if a}), "backend": answers[-1].backend,
        "tokens_per_s": round(count * length / seconds),
        "batch_ms": float(np.median([answer.compute_s for answer in answers]) * 1e3),
    }  # fmt: skip


def alone(engine: Engine, adapters: list[AdapterRef | None], tokens: int) -> dict[str, Any]:
    """Measure milliseconds from submit to vector of one prompt at a time. The first few do not count."""
    times = []
    for i in range(_WARM + _ALONE):
        prompt = np.full(tokens, 1 + i, dtype=np.int32)
        began = perf_counter()
        embed(engine, [prompt], [adapters[i % len(adapters)]])
        times.append((perf_counter() - began) * 1e3)
    counted = times[_WARM:]
    return {
        "prompt tokens": tokens, "adapters": len(adapters), "p50_ms": float(np.median(counted)),
        "p99_ms": float(np.percentile(counted, 99)), "first_ms": times[0],
    }  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__, "engine-h200")
    parser.add_argument("--layers", type=int, default=QWEN3_EMBEDDING_06B.layers, help="layers of the model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 64], help="number of adapters")
    parser.add_argument("--batches", type=int, default=24, help="full batches of each measurement")
    parser.add_argument("--backend", default="auto", help="LoRA backend")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", layers=options.layers)
        made = refs(write_adapters(folder / "adapters", max(options.adapters), layers=options.layers))
        config = EngineConfig(
            model_dir=model, slots=len(made), max_batch_tokens=30_720, max_rank=64, backend=options.backend,
            lora_modules=("q_proj", "k_proj", "v_proj", "o_proj"), host_cache_bytes=16 << 30,
        )  # fmt: skip
        with own_engine(config) as engine:
            for ref in track(made, description="loading adapters"):
                engine.load(ref)
            rows = []
            for length in track(LENGTHS, description="measuring"):
                rows.append(throughput(engine, [None], length, options.batches))
                rows += [throughput(engine, list(made[:count]), length, options.batches) for count in options.adapters]
            single = [alone(engine, list(made[: options.adapters[0]]), tokens) for tokens in (1, 16, 128, 512, 2048)]
    report.save(options.name, rows, options.out)
    report.save(f"{options.name}-alone", single, options.out)


if __name__ == "__main__":
    main()
