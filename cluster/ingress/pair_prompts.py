"""How the pairs of texts of requests for scores become prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ranklet.cluster.ingress.prompts import Tokenizer
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.cluster.ingress.scoring_prompts import ScoringPrompts
from ranklet.cluster.reranking import Reranking
from ranklet.replicas.errors import InvalidRequest

_MAX_CHARACTERS: Final = 64 << 20  # of all prompts of a request
_ROUNDS: Final = 4  # in which a document is shortened: its last word may have other tokens within a prompt


class PairText(str):
    """Two texts that become one prompt. As one text, it is the template's prompt, or both of them end to end."""

    __slots__ = ("texts",)
    texts: tuple[str, str]

    @classmethod
    def of(cls, first: str, second: str, reranking: Reranking | None) -> "PairText":
        if reranking is None or reranking.template is None:
            pair = cls(first + second)
        else:
            pair = cls(reranking.fill(first, second))
        pair.texts = first, second
        return pair


@dataclass(frozen=True)
class PairPrompts(ScoringPrompts):
    """Rules for prompts of pairs of texts. Prompts that are too long are shortened at the end of their second text.

    Attributes:
        reranking: has the template; without one, the tokenizer makes prompts of pairs.
        second_tokens: the second text of each pair is shortened to this number of tokens.
    """

    reranking: Reranking | None = None
    second_tokens: int | None = None

    def encode(self, tokenizer: Tokenizer, texts: Texts) -> TokenIds:
        pairs = [text for text in texts if isinstance(text, PairText)]
        assert len(pairs) == len(texts), "a request has only pairs, or none"
        most = None if self.truncation is None else self.truncation.tokens
        least = min((each for each in (most, self.second_tokens) if each is not None), default=None)
        if most is not None:
            self._check_first(tokenizer, pairs, most)
        tokens = [0] * len(pairs)
        if least is not None:
            pairs, tokens = self._shortened(tokenizer, pairs, [least] * len(pairs))
        prompts = self._tokenized(tokenizer, pairs)
        if most is not None:
            self._fit(tokenizer, pairs, tokens, prompts, most)
        return self.without_padding(prompts)

    def _check_first(self, tokenizer: Tokenizer, pairs: Sequence[PairText], most: int) -> None:
        for text in {pair.texts[0] for pair in pairs}:
            if len(text) > most and tokenizer.least_tokens(text) >= most:
                raise self._no_room(most)

    def _fit(
        self, tokenizer: Tokenizer, pairs: list[PairText], tokens: list[int], prompts: TokenIds, most: int
    ) -> None:
        """Shorten the second texts of prompts with more than `most` tokens, and replace these prompts.

        Args:
            tokens: numbers of tokens of the second texts.
        """
        long = [index for index, prompt in enumerate(prompts) if len(prompt) > most]
        for _ in range(_ROUNDS):
            limits = [tokens[index] - (len(prompts[index]) - most) for index in long]
            if any(limit < 1 for limit in limits):
                raise self._no_room(most)
            shorter, left = self._shortened(tokenizer, [pairs[index] for index in long], limits)
            again = self._tokenized(tokenizer, shorter)
            for index, pair, count, prompt in zip(long, shorter, left, again, strict=True):
                pairs[index], tokens[index], prompts[index] = pair, count, prompt
            long = [index for index in long if len(prompts[index]) > most]
        if long:
            raise self._no_room(most)

    def _shortened(
        self, tokenizer: Tokenizer, pairs: Sequence[PairText], limits: Sequence[int]
    ) -> tuple[list[PairText], list[int]]:
        """Return the pairs with at most these numbers of tokens in their second texts, and the numbers."""
        found = tokenizer.beginnings([pair.texts[1] for pair in pairs], limits)
        shorter = [
            pair if text == pair.texts[1] else PairText.of(pair.texts[0], text, self.reranking)
            for pair, (text, _) in zip(pairs, found, strict=True)
        ]
        return shorter, [count for _, count in found]

    def _tokenized(self, tokenizer: Tokenizer, pairs: Sequence[PairText]) -> TokenIds:
        if not pairs:
            return []
        if self.reranking is None or self.reranking.template is None:
            return tokenizer.encode_pairs([pair.texts for pair in pairs])
        return tokenizer.encode_plain(pairs, add_special_tokens=False)

    def _no_room(self, most: int) -> InvalidRequest:
        return InvalidRequest(
            f"truncate_prompt_tokens: expected room for a text of {self.param} beside the other text and the template, "
            f"got {most} tokens for all",
            param="truncate_prompt_tokens",
        )


def paired(first: Sequence[str], second: Sequence[str], reranking: Reranking | None, param: str) -> Texts:
    """Return a text for each pair. One first text belongs to all second ones.

    Args:
        reranking: has the template; without one, the tokenizer makes prompts of pairs.
        param: the field of the second texts.

    Raises:
        InvalidRequest: the texts would be too long together, since the first one and the template are repeated.
    """
    template = None if reranking is None else reranking.template
    each = len(template or "") + (len(first[0]) if len(first) == 1 else 0)
    total = each * len(second) + sum(map(len, second)) + sum(map(len, first))
    if total > _MAX_CHARACTERS:
        raise InvalidRequest(
            f"{param}: expected prompts with at most {_MAX_CHARACTERS} characters together, got {total}. Send several "
            "requests",
            param=param,
        )
    pairs = zip(itertools.repeat(first[0]) if len(first) == 1 else first, second, strict=False)
    return [PairText.of(*pair, reranking) for pair in pairs]
