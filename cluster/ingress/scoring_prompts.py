"""How the texts and pairs of texts of requests for scores become prompts."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ranklet.cluster.ingress.prompts import Tokenizer, shortened
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.cluster.reranking import Reranking
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer import Truncation

_MAX_CHARACTERS: Final = 64 << 20  # of all prompts of a request


class PairText(str):
    """Two texts that the tokenizer makes one prompt of. As one text, it is both of them end to end."""

    __slots__ = ("texts",)
    texts: tuple[str, str]

    @classmethod
    def of(cls, first: str, second: str) -> "PairText":
        pair = cls(first + second)
        pair.texts = first, second
        return pair


@dataclass(frozen=True)
class ScoringPrompts:
    """Rules for prompts whose last token gives a score.

    Attributes:
        param: the field of the request that has one text for each prompt.
        most_tokens: limit on the tokens of a prompt.
        pad_id: tokens at the end of a prompt that are left out, as in transformers; None leaves out none.
        adds_special_tokens: whether the tokenizer adds its special tokens.
        truncation: None refuses prompts that are too long.
    """

    limits: RequestLimits
    param: str
    most_tokens: int
    pad_id: int | None = None
    adds_special_tokens: bool = True
    truncation: Truncation | None = None

    @property
    def longest(self) -> int:
        return self.most_tokens if self.truncation is None else sys.maxsize

    def encode(self, tokenizer: Tokenizer, texts: Texts) -> TokenIds:
        pairs = [text.texts for text in texts if isinstance(text, PairText)]
        if pairs:
            assert len(pairs) == len(texts), "a request has only pairs, or none"
            return self._without_padding(tokenizer.encode_pairs(pairs))
        adds = self.adds_special_tokens
        return self._without_padding(tokenizer.encode_plain(texts, add_special_tokens=adds, truncation=self.truncation))

    def shorten(self, prompts: TokenIds) -> TokenIds:
        return self._without_padding(shortened(prompts, self.truncation))

    def _without_padding(self, prompts: TokenIds) -> TokenIds:
        """Return the prompts up to the last token that is not padding; those of padding alone up to their first one."""
        if self.pad_id is None:
            return prompts
        kept = []
        for prompt in prompts:
            others = (prompt != self.pad_id).nonzero()[0]
            kept.append(prompt[: int(others[-1]) + 1 if len(others) else 1])
        return kept

    def check(self, prompts: TokenIds) -> None:
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise InvalidRequest(f"{self._named(index)}: expected at least one token, got none", param=self.param)
            if len(prompt) > self.most_tokens:
                raise self._too_long(index, f"{len(prompt)}")
            self.limits.check_token_ids(self._named(index), prompt, self.param)

    def too_long(self, index: int, least: int) -> InvalidRequest:
        return self._too_long(index, f"at least {least}")

    def too_many_characters(self, index: int, most: int, got: int) -> InvalidRequest:
        return self._too_long(index, f"{got} characters, of which at most {most} are tokenized")

    def _too_long(self, index: int, got: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self._named(index)}: expected a prompt of 1 to {self.most_tokens} tokens, got {got}; shorten the text "
            "or split it",
            param=self.param,
        )

    def _named(self, index: int) -> str:
        return f"{self.param}[{index}]"


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
    if reranking is not None and template is not None:
        return [reranking.fill(*pair) for pair in pairs]
    return [PairText.of(*pair) for pair in pairs]
