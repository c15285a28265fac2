"""Times between the tokens of running texts while other work arrives: long prompts, batches of embeddings, or both.

Part of `tests.bench.generate`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ranklet.replicas.engine.engine import Engine
from tests.bench.engine import embed
from tests.bench.texts import TextModel, TextRun, random_prompts, run_texts, text_engine

MUST = 2.5  # p99 of the gaps, times the median without other work


class GapsScene(NamedTuple):
    streams: int
    prompt: int
    output: int
    long_prompt: int
    batch: int  # prompts of embeddings that arrive at once
    batch_prompt: int


FULL = GapsScene(64, 512, 1024, 30_000, 60, 512)
TINY = GapsScene(3, 20, 12, 200, 4, 16)


def measure(model: TextModel, name: str, *, tiny: bool, **settings: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of other work. Every row has new texts, so that contexts are equally long."""
    scene = TINY if tiny else FULL
    with text_engine(model, prefix_cache=False, **settings) as engine:
        streams(engine, model, scene)
        for other in ("nothing", "long prompts", "embeddings", "both"):
            with beside(engine, model, scene, other) as counts:
                run = streams(engine, model, scene)
                rates = {key: round(done / run.took_s) for key, done in counts.items()}
            gaps_ms = run.gaps_ms()
            p50_ms = float(np.median(gaps_ms))
            if other == "nothing":
                alone_ms = p50_ms
            p99_ms = float(np.percentile(gaps_ms, 99))
            row = {
                "shapes": name, "beside": other, "streams": scene.streams, "p50_ms": p50_ms, "p99_ms": p99_ms,
                "max_ms": float(gaps_ms.max()), "p99 ratio": p99_ms / alone_ms, "must": MUST,
                "tokens_per_s": round(run.tokens_per_s), **rates,
            }  # fmt: skip
            print(row, flush=True)
            yield row


def streams(engine: Engine, model: TextModel, scene: GapsScene) -> TextRun:
    prompts = random_prompts(engine, scene.streams, scene.prompt)
    return run_texts(engine, prompts, model.adapters[:4], scene.output)


@contextmanager
def beside(engine: Engine, model: TextModel, scene: GapsScene, other: str) -> Iterator[dict[str, int]]:
    """Send other work until the block ends, one request or batch after the other. Yields the tokens done so far."""
    counts = {"long prompt tokens_per_s": 0, "embedding tokens_per_s": 0}
    stop = threading.Event()

    def long_prompts() -> None:
        run_texts(engine, random_prompts(engine, 1, scene.long_prompt), model.adapters[4:5], 1)
        counts["long prompt tokens_per_s"] += scene.long_prompt

    def embeddings() -> None:
        prompts = random_prompts(engine, scene.batch, scene.batch_prompt)
        embed(engine, prompts, [model.adapters[i % 4] for i in range(scene.batch)])
        counts["embedding tokens_per_s"] += scene.batch * scene.batch_prompt

    def repeat(work: Callable[[], None]) -> None:
        while not stop.is_set():
            work()

    wanted = {"nothing": (), "long prompts": (long_prompts,), "embeddings": (embeddings,)}
    threads = [threading.Thread(target=repeat, args=(work,)) for work in wanted.get(other, (long_prompts, embeddings))]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()
