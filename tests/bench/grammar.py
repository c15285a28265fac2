"""Texts with grammars among others on one engine: rates, gaps of the others, and the first mask of a new schema.

Of 256 greedy texts, 64 must follow a schema of 2 KB that no text of this length completes. The rate and the gaps of the
192 others are compared with those of a run in which no text has a grammar. The model's weights are random.

First masks are timed alone: compilation of a schema that is new, and the mask of the first token.
"""

import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.grammar.compiler import GrammarCompiler
from ranklet.replicas.grammar.grammar import Grammar
from tests.bench import report
from tests.bench.texts import SHAPES, TextRun, TokenTimes, greedy, make_text_model, random_prompts, text_engine
from tests.bench.vocabulary import save_full_tokenizer

MUST_RATE = 0.9  # of the rate without grammars
MUST_GAP = 1.03  # of the others' median gap
MUST_FIRST_MS = 50.0


class GrammarWork(NamedTuple):
    texts: int
    bound: int  # texts with a grammar
    prompt: int
    output: int


FULL, TINY = GrammarWork(256, 64, 32, 512), GrammarWork(8, 3, 10, 12)


def schema(name: str, size: int = 2048) -> dict[str, Any]:
    """Return a schema of about `size` bytes, whose shortest text has thousands of tokens."""
    properties: dict[str, Any] = {}
    kinds = (
        {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 9999},
        {"enum": ["open", "closed", "waiting"]}, {"type": "array", "items": {"type": "number"}, "maxItems": 5},
    )  # fmt: skip
    while len(json.dumps(properties)) < size - 200:
        properties[f"{name}_{len(properties)}"] = kinds[len(properties) % len(kinds)]
    item = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "array", "items": item, "minItems": 1000}


def run(
    engine: Engine, prompts: Sequence[NDArray[np.int32]], adapters: Sequence[AdapterRef], output: int, bound: int
) -> TextRun:
    """Submit greedy texts at once and wait for all. The last `bound` have a grammar."""
    free = greedy(output)
    grammar = Grammar.of_schema(schema("field"))
    finished = threading.Semaphore(0)
    texts = [TokenTimes(finished) for _ in prompts]
    began_s = perf_counter()
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        has_grammar = index >= len(prompts) - bound
        params = replace(free, ignore_eos=False, grammar=grammar) if has_grammar else free
        engine.submit([prompt], adapters[index % len(adapters)], params, text)
    for _ in texts:
        finished.acquire()
    return TextRun(texts, began_s, perf_counter() - began_s)


def steady(whole: TextRun, free: int) -> tuple[float, float, float]:
    """Return tokens per second until the first text ends, and the median and p99 of the gaps of the first `free`."""
    end_s = min(text.times_s[-1] for text in whole.texts)
    start_s = max(text.times_s[0] for text in whole.texts)
    tokens = sum(start_s < time_s <= end_s for text in whole.texts for time_s in text.times_s)
    others = TextRun(whole.texts[:free], whole.began_s, whole.took_s)
    gaps_ms = others.gaps_ms()
    return tokens / (end_s - start_s), float(np.median(gaps_ms)), float(np.percentile(gaps_ms, 99))


def first_masks(folder: Path, vocab: int, count: int) -> dict[str, Any]:
    compiler = GrammarCompiler((folder / "tokenizer.json").read_text(), vocab, [0])
    took_ms = []
    for number in range(count):
        grammar = Grammar.of_schema(schema(f"new{number}"))
        began_s = perf_counter()
        compiler.start_text(grammar)
        took_ms.append((perf_counter() - began_s) * 1e3)
    return {"p50_ms": float(np.median(took_ms)), "p99_ms": max(took_ms), "must": MUST_FIRST_MS}


def main() -> None:
    parser = report.parser(__doc__, "grammar-h200")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="0.6B")
    parser.add_argument("--repeats", type=int, default=3, help="runs, in turn, of which the best counts")
    options = parser.parse_args()
    work = TINY if options.shapes == "tiny" else FULL
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_text_model(Path(scratch), options.shapes, 4)
        save_full_tokenizer(model.folder, model.shape.vocab)
        with text_engine(model, prefix_cache=False, max_batch_requests=work.texts) as engine:
            prompts = random_prompts(engine, work.texts, work.prompt)
            found: dict[int, list[tuple[float, float, float]]] = {0: [], work.bound: []}
            for repeat in range(options.repeats + 1):  # the first runs capture graphs
                for bound, measured in found.items():
                    whole = run(engine, prompts, model.adapters, work.output, bound)
                    for text in whole.texts:
                        text.answer()
                    if repeat:
                        measured.append(steady(whole, work.texts - work.bound))
        alone = max(found[0])
        for bound, measured in found.items():
            rate, p50_ms, p99_ms = max(measured)
            rows.append({
                "what": f"{bound} of {work.texts} texts with a grammar", "tokens_per_s": round(rate),
                "of none": rate / alone[0], "must": MUST_RATE if bound else None, "p50_ms": p50_ms, "p99_ms": p99_ms,
                "gap of none": p50_ms / alone[1], "must gap": MUST_GAP if bound else None,
            })  # fmt: skip
        masks = first_masks(model.folder, model.shape.vocab, 20)
        rows.append(dict.fromkeys(rows[0], None) | {"what": "first mask of a new schema of 2 KB", **masks})
    report.save(options.name, rows, options.out)


if __name__ == "__main__":
    main()
