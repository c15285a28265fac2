"""Rates of generated text of one engine without a server: greedy, end of text ignored, adapters on all projections.

Three parts, which --only selects:

- table: works of equal prompts, submitted at once, without the prefix cache. The better of two runs counts, as it did
  for the peer, vLLM 0.26.0 on an H200. `must` is what this project wants to reach there.
- shared: requests with a long common beginning, under 8 adapters, with the prefix cache and without.
- gaps: times between the tokens of 64 texts, alone and while long prompts and batches of embeddings arrive.

The tokens of a prompt are random, so the texts mean nothing.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from tests.bench import gaps, report
from tests.bench.texts import (
    SHAPES,
    TextModel,
    TextRun,
    add_keep,
    make_text_model,
    model_folder,
    random_prompts,
    run_texts,
    text_engine,
)

PARTS = ("table", "shared", "gaps")


class TextWork(NamedTuple):
    requests: int
    prompt: int
    output: int
    adapters: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.requests} x {self.prompt}/{self.output}"


WORKS = (
    TextWork(1, 512, 256, (0, 1)),
    TextWork(16, 512, 256, (0, 4)),
    TextWork(512, 512, 256, (0, 4, 32)),
    TextWork(256, 32, 512, (0, 4, 32)),
)
TINY_WORKS = (TextWork(1, 20, 8, (0, 1)), TextWork(6, 20, 8, (0, 4)))
TARGETS: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {  # (must, peer) by the number of adapters, in tokens/s
    ("0.6B", "1 x 512/256"): ((750, 445), (650, 302)),
    ("0.6B", "16 x 512/256"): ((9_000, 5_869), (7_800, 4_043)),
    ("0.6B", "512 x 512/256"): ((36_000, 29_219), (33_500, 18_954), (32_000, 15_112)),
    ("0.6B", "256 x 32/512"): ((62_000, 48_028), (57_000, 33_832), (55_000, 24_446)),
    ("8B", "1 x 512/256"): ((220, 201), (200, 139)),
    ("8B", "16 x 512/256"): ((3_200, 2_663), (2_900, 1_682)),
    ("8B", "512 x 512/256"): ((10_800, 9_788), (10_000, 6_947), (9_300, 5_406)),
    ("8B", "256 x 32/512"): ((26_000, 21_425), (24_000, 14_776), (22_000, 9_805)),
}


def table(model: TextModel, name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    began_s = perf_counter()
    with text_engine(model, prefix_cache=False, **fields(options)) as engine:
        print(f"{name}: up after {perf_counter() - began_s:.1f} s", flush=True)
        for work in TINY_WORKS if name == "tiny" else WORKS:
            if options.work and not any(part in str(work) for part in options.work):
                continue
            wanted = TARGETS.get((name, str(work)), ((None, None),) * len(work.adapters))
            for adapters, (must, peer) in zip(work.adapters, wanted, strict=True):
                if options.adapters and adapters not in options.adapters:
                    continue
                run = best(engine, model, work, adapters, options.repeats)
                row = {
                    "shapes": name, "work": str(work), "adapters": adapters, "tokens_per_s": round(run.tokens_per_s),
                    "step_ms": float(np.median(run.gaps_ms())), "peer": peer, "must": must,
                    "first_p50_ms": float(np.median(run.first_ms())), "backend": run.texts[-1].answer().backend,
                }  # fmt: skip
                print(row, flush=True)
                yield row


def best(engine: Engine, model: TextModel, work: TextWork, adapters: int, repeats: int) -> TextRun:
    """Return the fastest of some runs, after a short one that captures the graphs of this batch."""
    used: Sequence[AdapterRef | None] = model.adapters[:adapters] or [None]
    prompts = random_prompts(engine, work.requests, work.prompt)
    run_texts(engine, prompts, used, min(8, work.output))
    return max(
        (run_texts(engine, prompts, used, work.output) for _ in range(repeats)), key=lambda run: run.tokens_per_s
    )


def shared(model: TextModel, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare rates with and without the prefix cache. Each run has a new common beginning, not yet in the cache."""
    requests, common, own, output = (12, 80, 5, 4) if name == "tiny" else (256, 2000, 32, options.shared_output)
    used = model.adapters[:8]
    rows: list[dict[str, Any]] = []
    for cached in (False, True):
        with text_engine(model, prefix_cache=cached, **fields(options)) as engine:
            runs = []
            for seed in range(options.repeats + 1):  # the first run warms up
                start = random_prompts(engine, 1, common, seed)[0]
                prompts = [np.concatenate([start, end]) for end in random_prompts(engine, requests, own, seed)]
                runs.append(run_texts(engine, prompts, used, output))
            run = max(runs[1:], key=lambda each: each.tokens_per_s)
            reused = sum(text.answer().result.cached_tokens for text in run.texts)
        rows.append({
            "shapes": name, "work": f"{requests} x ({common} common + {own})/{output}", "adapters": len(used),
            "prefix_cache": cached, "tokens_per_s": round(run.tokens_per_s),
            "cached share": reused / (requests * (common + own)),
            "ratio": run.tokens_per_s / rows[0]["tokens_per_s"] if rows else 1.0, "must": 3.0 if cached else None,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the engine's settings that options give."""
    names = ("max_batch_tokens", "decode_slowdown", "backend", "kv_cache_fraction")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {"max_batch_requests": 256, **given}


def main() -> None:
    parser = report.parser(__doc__, "generate-h200")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["0.6B", "8B"], help="models")
    parser.add_argument("--work", nargs="+", help="of the table, works whose names contain one of these texts")
    parser.add_argument("--adapters", type=int, nargs="+", help="of the table, numbers of adapters")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the best counts")
    parser.add_argument("--shared-output", type=int, default=32, help="tokens of each text of the part `shared`")
    add_keep(parser)
    parser.add_argument("--max-batch-tokens", type=int, help="as the engine's setting, here and below")
    parser.add_argument("--decode-slowdown", type=float)
    parser.add_argument("--kv-cache-fraction", type=float)
    parser.add_argument("--backend")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in options.only}
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(options))
        for name in options.shapes:
            model = make_text_model(folder, name, 8 if name == "tiny" else 32)
            if "table" in rows:
                rows["table"] += table(model, name, options)
            if "shared" in rows:
                rows["shared"] += shared(model, name, options)
            if "gaps" in rows:
                rows["gaps"] += gaps.measure(model, name, tiny=name == "tiny", **fields(options))
    for part, found in rows.items():
        report.save(options.name if part == "table" else f"{options.name}-{part}", found, options.out)


if __name__ == "__main__":
    main()
