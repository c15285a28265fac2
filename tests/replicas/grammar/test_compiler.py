"""Compiled grammars: memory does not grow with their number, and texts go on when others fill the lexer they share."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ranklet.replicas.grammar.compiler import GrammarCompiler
from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.text_grammar import TextGrammar

VOCAB, END = 1024, 1
GROWTH_MB = 15  # measured: 5, and 58 if all grammars are kept
WORDS = ("a", "e", "i", "o", "u", "th", "st")
LARGE = "|".join(f"[a-z ]*{word}[a-z ]{{50}}" for word in WORDS)  # each token leads to hundreds of new states


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_stays_the_same_over_hundreds_of_grammars() -> None:
    command = [sys.executable, "-m", "tests.bench.grammar_memory", "--grammars", "600", "--warm", "200"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    for name in ("compiler", "checker"):
        assert 0 < found[f"{name}_most"] < found[f"{name}_warm"] + GROWTH_MB


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> GrammarCompiler:
    return GrammarCompiler((model_dir / "tokenizer.json").read_text(encoding="utf-8"), VOCAB, [END])


def allowed(text: TextGrammar) -> list[int]:
    bits = np.unpackbits(text.allowed.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits) if token != END]


def test_texts_go_on_when_another_has_filled_their_lexer(compiler: GrammarCompiler) -> None:
    grammar, choose = Grammar("regex", LARGE), random.Random(3)
    waiting = [compiler.start_text(grammar) for _ in range(2)]
    filling = compiler.start_text(grammar)
    kept = filling.kept
    assert {id(text.kept) for text in waiting} == {id(kept)}
    for _ in range(2000):
        compiler.go_on([filling], [choose.choice(allowed(filling))])
        assert filling.problem is None
        if filling.kept is not kept:
            break
    assert filling.kept is not kept, "the lexer has room for all states"
    for _ in range(3):
        compiler.go_on(waiting, [choose.choice(allowed(text)) for text in waiting])
    later = compiler.start_text(grammar)
    assert {id(text.kept) for text in (*waiting, later)} == {id(filling.kept)}
    for text in (filling, *waiting):
        assert text.problem is None
        alone = compiler.start_text(grammar, text.ids)
        np.testing.assert_array_equal(text.allowed, alone.allowed)
