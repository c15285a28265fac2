"""What one text may go on with."""

from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from ranklet.replicas.grammar.grammar import Grammar
from ranklet.replicas.grammar.refusal import problem_of


class TextGrammar:
    """The state of one text in its grammar. One thread at a time uses it.

    Ids beyond the base model's, which adapters may have, are never allowed, and those in arguments have no effect.

    Args:
        kept: the matcher of no text, with which texts of the grammar begin.
        given: tokens of the text. Its matcher has not consumed them.
        vocab: number of token ids of the base model.
        end_ids: end the text. They are allowed only where the text is complete.
        allowed_ids: the only other tokens; None allows all.
        min_tokens: ids that end the text are banned until it has this many tokens, unless nothing else is possible.

    Attributes:
        matcher: of no other text. It shares a lexer with `kept`.
        ids: tokens of the text.
        allowed: int32 [words]: bit t % 32 of word t // 32 allows token t as the next one.
        problem: why the text cannot go on; None if it can.
    """

    def __init__(
        self, grammar: Grammar, kept: LLMatcher, given: Sequence[int], vocab: int, end_ids: Collection[int],
        allowed_ids: Sequence[int] | None = None, stop_ids: Collection[int] = (), min_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.grammar = grammar
        self.restart(kept)
        self.ids = list(given)
        self.allowed = np.zeros(-(-vocab // 32), dtype=np.int32)
        self.problem: str | None = None
        self._vocab = vocab
        self._ends = _bits(end_ids, vocab)
        self._others = ~self._ends
        self._stops = self._ends | _bits(stop_ids, vocab)
        self._only = None if allowed_ids is None else _bits(allowed_ids, vocab)
        self._min_tokens = min_tokens
        self._mask = self.allowed

    def add_ends(self, end_ids: Collection[int]) -> None:
        """Let more ids end the text: those of its adapter."""
        more = _bits(end_ids, self._vocab)
        self._ends, self._stops = self._ends | more, self._stops | more
        self._others = ~self._ends
        self._restrict()

    def restart(self, kept: LLMatcher) -> None:
        """Replace the matcher by one that has consumed nothing."""
        self.kept, self.matcher = kept, kept.deep_copy()

    def take(self, mask: NDArray[np.int32]) -> None:
        """Take the matcher's mask, after it has consumed the text's tokens."""
        self._mask = mask
        self.problem = problem_of(self.matcher)
        self._restrict()

    def _restrict(self) -> None:
        if self.problem is not None:
            return
        allowed = np.bitwise_and(self._mask, self._others)
        if self._only is not None:
            allowed &= self._only
        if self.matcher.is_accepting():
            if len(self.ids) >= self._min_tokens:
                allowed |= self._ends
            elif not (allowed := allowed & ~self._stops).any():
                allowed = self._ends
        elif len(self.ids) < self._min_tokens and (rest := allowed & ~self._stops).any():
            allowed = rest
        self.allowed = allowed
        if not np.count_nonzero(allowed):  # faster than `any`
            self.problem = "allowed_token_ids allow no token with which the text could go on"


def _bits(ids: Collection[int], vocab: int) -> NDArray[np.int32]:
    tokens = np.fromiter(ids, dtype=np.int64)
    tokens = tokens[tokens < vocab]
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    np.bitwise_or.at(words, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))
    return words.view(np.int32)
