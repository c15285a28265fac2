"""How the texts of requests for scores become prompts."""

import sys
from dataclasses import dataclass

from ranklet.cluster.ingress.prompts import Tokenizer, shortened
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer import Truncation


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
        adds = self.adds_special_tokens
        return self.without_padding(tokenizer.encode_plain(texts, add_special_tokens=adds, truncation=self.truncation))

    def shorten(self, prompts: TokenIds) -> TokenIds:
        return self.without_padding(shortened(prompts, self.truncation))

    def without_padding(self, prompts: TokenIds) -> TokenIds:
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
