"""The process that checks grammars is limited in time and memory, and results are kept."""

from collections.abc import Iterator

import pytest

from ranklet.replicas.grammar.checker import GrammarChecker
from ranklet.replicas.grammar.grammar import MAX_GRAMMAR_BYTES, Grammar


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker()
    made.start()
    yield made
    made.stop()


def test_results_are_kept(checker: GrammarChecker) -> None:
    good, bad = Grammar("regex", "a+"), Grammar("regex", "(")
    assert not checker.knows(good)
    for _ in range(2):
        assert checker.refusal(good) is None
        assert "unclosed" in (checker.refusal(bad) or "")
    assert checker.knows(good)
    assert checker.quick_refusal(good) is None
    assert checker.quick_refusal(bad) == checker.refusal(bad)


def test_the_number_of_results_is_bounded(checker: GrammarChecker) -> None:
    grammars = [Grammar("regex", f"b{number}") for number in range(1050)]
    assert {checker.refusal(grammar) for grammar in grammars} == {None}
    assert not checker.knows(grammars[0])
    assert checker.knows(grammars[-1])


def test_what_is_too_large_is_refused_without_a_check(checker: GrammarChecker) -> None:
    assert "at most" in (checker.quick_refusal(Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1))) or "")
    assert "surrogate" in (checker.quick_refusal(Grammar("regex", "\ud800")) or "")
