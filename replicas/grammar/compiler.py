"""Compiles grammars for the tokens of a base model, and computes which tokens texts may go on with."""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.grammar import Grammar, not_enforced
from ranklet.replicas.grammar.refusal import LIMITS, is_full, problem_of
from ranklet.replicas.grammar.text_grammar import TextGrammar

MAX_KEPT: Final = 128
_MAX_KEPT_BYTES = 8 << 20  # of the grammars' texts
_THREADS = 4  # of the masks of one step


class GrammarCompiler:
    """Keeps compiled grammars by their content. Thread-safe.

    Args:
        tokenizer: content of tokenizer.json.
        vocab: number of token ids of the model; the tokenizer may have fewer.
        end_ids: tokens that end a text of the base model.
    """

    def __init__(self, tokenizer: str, vocab: int, end_ids: Collection[int]) -> None:
        self._tokenizer = LLTokenizer(_without_changes(tokenizer), n_vocab=vocab, eos_token=sorted(end_ids))
        self._vocab = vocab
        self._end_ids = tuple(end_ids)
        self._executor = LLExecutor(num_threads=_THREADS)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._kept_bytes = 0

    def start_text(
        self, grammar: Grammar, given: Sequence[int] = (), allowed_ids: Sequence[int] | None = None,
        stop_ids: Collection[int] = (), min_tokens: int = 0,
    ) -> TextGrammar:  # fmt: skip
        """Return the state of a text that begins with `given` tokens. Compiles the grammar unless it is kept.

        Args:
            allowed_ids: see `TextGrammar`, as for the others.

        Raises:
            InvalidRequest: the grammar cannot be enforced, or the text does not follow it.
        """
        kept = self._matcher(grammar)
        text = TextGrammar(grammar, kept, given, self._vocab, self._end_ids, allowed_ids, stop_ids, min_tokens)
        mask = self._new_masks(1)
        consumed = _catch_up(text, mask)
        if is_full(text.matcher):
            consumed = self._renew(text, mask)
        if consumed < len(given) and not is_full(text.matcher):
            raise InvalidRequest("expected tokens that follow the grammar, to go on with")
        text.take(mask[0])
        if text.problem is not None:
            raise not_enforced(text.problem)
        return text

    def go_on(self, texts: Sequence[TextGrammar], tokens: Sequence[int]) -> None:
        """Add a token to each text, and compute what may follow. Does not hold the GIL most of the time."""
        masks = self._new_masks(len(texts))
        self._executor.consume_token_par([(text.matcher, token) for text, token in zip(texts, tokens, strict=True)])
        fill_next_token_bitmask_par(self._executor, [(text.matcher, i) for i, text in enumerate(texts)], masks)
        for index, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            text.ids.append(token)
            mask = masks[index : index + 1]
            if is_full(text.matcher):
                self._renew(text, mask)
            text.take(mask[0])

    def _renew(self, text: TextGrammar, mask: NDArray[np.int32]) -> int:
        """Give a text a lexer with room. Texts of one grammar share theirs, so that others may have filled it."""
        with self._lock:
            if self._kept.get(text.grammar) is text.kept:
                self._forget(text.grammar)
        text.restart(self._matcher(text.grammar))
        return _catch_up(text, mask)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        made = LLMatcher(self._tokenizer, grammar.definition(), log_level=0, limits=LIMITS)
        if not made.is_error():
            fill_next_token_bitmask(made, self._new_masks(1))  # copies share what this has computed
        problem = problem_of(made)
        if problem is not None:
            raise not_enforced(problem)
        with self._lock:
            if grammar not in self._kept:
                self._kept_bytes += len(grammar.text)
            self._kept[grammar] = made
            while len(self._kept) > MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
                self._forget(next(iter(self._kept)))
        return made

    def _forget(self, grammar: Grammar) -> None:
        del self._kept[grammar]
        self._kept_bytes -= len(grammar.text)

    def _new_masks(self, count: int) -> NDArray[np.int32]:
        return np.zeros((count, -(-self._vocab // 32)), dtype=np.int32)


def _catch_up(text: TextGrammar, mask: NDArray[np.int32]) -> int:
    """Let a new matcher consume the text's tokens, and compute what may follow. Returns how many it has consumed."""
    consumed = text.matcher.try_consume_tokens(text.ids)
    fill_next_token_bitmask(text.matcher, mask)
    return int(consumed)


def _without_changes(tokenizer: str) -> str:
    """Drop normalizers that change a text, such as Unicode's NFC. llguidance tokenizes what a grammar prescribes.

    Those that spell spaces as SentencePiece does stay.
    """
    content = json.loads(tokenizer)
    normalizer = content.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    kept = [each for each in parts if each.get("type") in ("Prepend", "Replace")]
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return json.dumps(content)
