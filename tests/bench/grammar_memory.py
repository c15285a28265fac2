"""Memory of the processes that check and compile grammars, while they get random ones.

Half of the grammars are usual schemas (`tests/assets/schemas.py`). The others are large, without any text, refused, or
make many states of a lexer. Texts of random tokens follow those that can be enforced. Prints a line of JSON: the MB
that each process has during the first `--warm` grammars, when caches fill, and the most that it has afterwards; and how
many grammars the checker still knows.

    python -m tests.bench.grammar_memory --grammars 20000
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.checker import GrammarChecker
from ranklet.replicas.grammar.compiler import GrammarCompiler
from ranklet.replicas.grammar.grammar import Grammar
from tests.assets.schemas import SchemaMaker
from tests.assets.tokenizer import save_tokenizer

VOCAB = 1024
END = 1
STEPS = 12  # of a text
EVERY = 25  # grammars between measurements


def grammar_of(seed: int) -> Grammar:
    choose = random.Random(seed)
    if choose.random() < 0.5:
        return Grammar.of_schema({**SchemaMaker(seed).make(), "title": str(seed)})
    return choose.choice(_HOSTILE)(choose)


def _long_names(choose: random.Random) -> Grammar:
    names = [f"{choose.random()}" for _ in range(choose.randint(10, 200))]
    return Grammar.of_schema({"type": "object", "properties": {name: {"type": "integer"} for name in names}})


def _without_text(choose: random.Random) -> Grammar:
    return Grammar("lark", f'start: x{choose.randint(0, 9999)}\nx{choose.randint(0, 9999)}: "a"')


_HOSTILE: tuple[Callable[[random.Random], Grammar], ...] = (
    lambda choose: Grammar("regex", f"[a-z ]*{choose.choice('aeiou')}[a-z ]{{{choose.randint(10, 60)}}}"),  # states
    lambda choose: Grammar("regex", f"(a|bc|{choose.random()}){{0,{choose.randint(10, 900)}}}"),
    lambda choose: Grammar("regex", "(" * choose.randint(1, 400) + str(choose.random())),
    lambda choose: Grammar("regex", f"(?={choose.random()})"),
    lambda choose: Grammar.of_schema({"enum": [choose.random() for _ in range(choose.randint(10, 1000))]}),
    lambda choose: Grammar.of_schema({"not": {}, "title": choose.random()}),
    lambda choose: Grammar.of_schema({"$ref": f"#/{choose.random()}"}),
    lambda choose: Grammar("lark", "start: " + " ".join(f'"{word}"?' for word in range(choose.randint(10, 300)))),
    _long_names,
    _without_text,
)


def follow(compiler: GrammarCompiler, grammar: Grammar, seed: int) -> None:
    draw = np.random.default_rng(seed)
    try:
        text = compiler.start_text(grammar)
    except (InvalidRequest, ValueError):
        return
    for _ in range(STEPS):
        allowed = np.flatnonzero(np.unpackbits(text.allowed.view(np.uint8), bitorder="little"))
        if text.problem is not None or set(allowed.tolist()) <= {END}:
            return
        compiler.go_on([text], [int(draw.choice(allowed[allowed != END]))])


def resident_mb(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def measure(grammars: int, warm: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), vocab_size=VOCAB, max_length=4096)
        compiler = GrammarCompiler((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"), VOCAB, [END])
    checker = GrammarChecker()
    checker.start()
    found = {"compiler_warm": 0.0, "compiler_most": 0.0, "checker_warm": 0.0, "checker_most": 0.0}
    for index in range(1, grammars + 1):
        grammar = grammar_of(index)
        checker.refusal(grammar)
        follow(compiler, grammar, index)
        if index % EVERY == 0:
            part = "warm" if index <= warm else "most"
            for name, mb in (("compiler", resident_mb()), ("checker", max(map(resident_mb, children())))):
                found[f"{name}_{part}"] = max(found[f"{name}_{part}"], mb)
    found["known"] = sum(map(checker.knows, set(map(grammar_of, range(1, grammars + 1)))))
    checker.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grammars", type=int, default=20_000)
    parser.add_argument("--warm", type=int, default=2000)
    options = parser.parse_args()
    print(json.dumps(measure(options.grammars, options.warm)))


if __name__ == "__main__":
    main()
