"""Random texts that must follow JSON schemas, on one engine with a real model: is each finished one valid?

Schemas are made at random (`tests/assets/schemas.py`). Texts are drawn at temperature 1, for the base model and its
trained adapters in turn, many at once. With few `--pages` of keys and values, fewer run at once.
A text that is cut at its limit ends with `length`; no other may fail to be valid for its schema, by `jsonschema`.
"""

import json
import threading
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jsonschema import Draft202012Validator, ValidationError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.tensors import page_bytes
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import TextChoice
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.model.architecture import read_architecture, read_config
from tests.assets.schemas import SchemaMaker
from tests.assets.smollm import make_smollm
from tests.assets.training.lessons import LESSONS, TRAINED
from tests.assets.training.train import BASE, Chat
from tests.bench import report
from tests.bench.engine import refs
from tests.bench.texts import TokenTimes

_ROWS = 48  # texts at once
_ROOT = Path(__file__).parents[2]


def outcome(text: str, choice: TextChoice, schema: dict[str, Any]) -> str:
    """Return valid, cut or invalid."""
    if choice.finish_reason == "length":
        return "cut"
    try:
        Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        print(f"invalid: {text!r} for {json.dumps(schema)}: {error}", flush=True)
        return "invalid"
    return "valid"


def ask(
    engine: Engine, prompts: list[NDArray[np.int32]], adapters: list[AdapterRef | None], schemas: list[dict[str, Any]],
    max_tokens: int,
) -> list[TokenTimes]:  # fmt: skip
    finished = threading.Semaphore(0)
    texts = [TokenTimes(finished) for _ in schemas]
    for index, (schema, text) in enumerate(zip(schemas, texts, strict=True)):
        params = GenerateParams(max_tokens=max_tokens, seed=index, grammar=Grammar.of_schema(schema))
        engine.submit([prompts[index % len(prompts)]], adapters[index % len(adapters)], params, text)
    for _ in texts:
        finished.acquire()
    return texts


def main() -> None:
    parser = report.parser(__doc__, "grammar-schemas-cpu")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=112, help="of a text")
    parser.add_argument("--pages", type=int, default=60, help="pages of 64 tokens for keys and values")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; downloads it by default")
    options = parser.parse_args()
    folder = options.model or make_smollm(_ROOT / ".demo" / "smollm")
    chat, tokenizer = Chat(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [np.array(chat.question(text), np.int32) for text in ("Describe a person as JSON.", "Book a flight.")]
    architecture = read_architecture(read_config(folder))
    kept = options.pages * page_bytes(architecture, torch.float32)
    adapters = [None, *refs([TRAINED / lesson.name for lesson in LESSONS])]
    config = EngineConfig(
        folder, slots=len(LESSONS), max_rank=16, max_batch_requests=_ROWS, max_batch_tokens=1024, max_model_len=512,
        dtype="float32", kv_cache_bytes=kept, base_aliases=(BASE,),
    )  # fmt: skip
    schemas = [SchemaMaker(seed).make() for seed in range(options.schemas)]
    engine = Engine(config)
    engine.start()
    began_s = perf_counter()
    try:
        texts = ask(engine, prompts, adapters, schemas, options.max_tokens)
        took_s = perf_counter() - began_s
        state = engine.snapshot().kv_cache
        engine.check_integrity()
    finally:
        engine.stop()
    counts: dict[str, Counter[str]] = {}
    for index, (schema, text) in enumerate(zip(schemas, texts, strict=True)):
        adapter = adapters[index % len(adapters)]
        (choice,) = text.answer().result.choices
        ids = choice.tokens.tolist()[: -1 if choice.finish_reason == "stop" else None]
        found = outcome(tokenizer.decode(ids, skip_special_tokens=False), choice, schema)
        counts.setdefault("base" if adapter is None else adapter.name, Counter())[found] += 1
    total = sum(counts.values(), Counter())
    rows = [
        {"model": name, "texts": each.total(), "valid": each["valid"], "cut": each["cut"], "invalid": each["invalid"]}
        for name, each in [*counts.items(), ("all", total)]
    ]
    preemptions = 0 if state is None else state.preemptions
    report.save(options.name, [{**row, "preemptions": preemptions, "took_s": took_s} for row in rows], options.out)


if __name__ == "__main__":
    main()
