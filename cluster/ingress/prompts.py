"""How the texts of requests become the token ids of prompts, and what the prompts of each kind must be like."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer import Truncation, TruncationSide


class Tokenizer(Protocol):
    """The part of `ranklet.replicas.model.tokenizer.PromptTokenizer` that makes prompts."""

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, add_special_tokens: bool | None = None,
        truncation: Truncation | None = None,
    ) -> list[NDArray[np.int32]]: ...  # fmt: skip

    def count_prompt(self, prompt: str, *, add_special_tokens: bool | None = None) -> int: ...

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]: ...

    def beginnings(self, texts: Sequence[str], tokens: Sequence[int]) -> list[tuple[str, int]]: ...

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.int32]]: ...

    def least_tokens(self, text: str) -> int: ...

    def most_characters(self, tokens: int) -> int: ...


def truncation_of(
    tokens: int | None, side: TruncationSide | None, longest: int, usual_side: TruncationSide
) -> Truncation | None:
    """Return the truncation that a request wants by vLLM's fields; None for none.

    Args:
        tokens: `truncate_prompt_tokens`. -1 is the longest prompt.
        side: `truncation_side`.

    Raises:
        InvalidRequest: `tokens` is out of range.
    """
    if tokens is None or longest < 1:  # without room for a prompt, each is refused as too long
        return None
    if tokens != -1 and not 1 <= tokens <= longest:
        raise InvalidRequest(
            f"truncate_prompt_tokens: expected 1 to {longest}, or -1 for the longest prompt, got {tokens}",
            param="truncate_prompt_tokens",
        )
    return Truncation(longest if tokens == -1 else tokens, side or usual_side)


def shortened(prompts: TokenIds, truncation: Truncation | None) -> TokenIds:
    """Return token ids of a request, shortened. The request has all special tokens that it wants."""
    if truncation is None:
        return prompts
    kept = slice(truncation.tokens) if truncation.side == "right" else slice(-truncation.tokens, None)
    return [prompt[kept] for prompt in prompts]


class PromptRules(Protocol):
    """The rules for the prompts of one request."""

    @property
    def longest(self) -> int:
        """Number of tokens that a text may have."""

    def encode(self, tokenizer: Tokenizer, texts: Texts) -> TokenIds:
        """Return the token ids of each text. Blocks."""

    def shorten(self, prompts: TokenIds) -> TokenIds:
        """Return token ids of the request, shortened as its texts are."""

    def check(self, prompts: TokenIds) -> None:
        """Raise InvalidRequest if a prompt is too long or has an unknown token id."""

    def too_long(self, index: int, least: int) -> InvalidRequest:
        """Return the error for text `index`, which has at least `least` tokens."""

    def too_many_characters(self, index: int, most: int, got: int) -> InvalidRequest:
        """Return the error for text `index`, whose tokens are not counted, since it has too many characters."""


class ContextTooLong(InvalidRequest):  # named as its siblings in replicas/errors.py
    """A prompt and its text do not fit into the context. Clients look for this code, and for the numbers."""

    code, status = "context_length_exceeded", 400


@dataclass(frozen=True)
class EmbeddingPrompts:
    """Rules for the inputs of embeddings.

    Attributes:
        most_tokens: limit on the tokens of an input.
        prompt: text before every text.
        skipped: number of first tokens that pooling leaves out. Each input must have others.
        adds_special_tokens: whether the tokenizer adds its special tokens, such as EOS; None as the folder says.
        truncation: None refuses inputs that are too long.
    """

    limits: RequestLimits
    most_tokens: int
    prompt: str = ""
    skipped: int = 0
    adds_special_tokens: bool | None = None
    truncation: Truncation | None = None

    @property
    def longest(self) -> int:
        return self.most_tokens if self.truncation is None else sys.maxsize

    def encode(self, tokenizer: Tokenizer, texts: Texts) -> TokenIds:
        return tokenizer.encode(
            texts, prompt=self.prompt, add_special_tokens=self.adds_special_tokens, truncation=self.truncation
        )

    def shorten(self, prompts: TokenIds) -> TokenIds:
        return shortened(prompts, self.truncation)

    def check(self, prompts: TokenIds) -> None:
        # The engine checks too, but it sees the parts of a split request, so its indices would be wrong.
        self.limits.check_prompts(prompts, self.most_tokens)
        for index, prompt in enumerate(prompts) if self.skipped else ():
            if len(prompt) <= self.skipped:
                raise InvalidRequest(
                    f"input[{index}]: expected more than the {self.skipped} tokens of the prompt, which pooling leaves "
                    f"out (include_prompt: false), got {len(prompt)}",
                    param="input",
                )

    def too_long(self, index: int, least: int) -> InvalidRequest:
        return InvalidRequest(
            f"input[{index}]: expected 1 to {self.longest} tokens, got at least {least}; shorten the text or split it",
            param="input",
        )

    def too_many_characters(self, index: int, most: int, got: int) -> InvalidRequest:
        return InvalidRequest(
            f"input[{index}]: expected 1 to {self.longest} tokens, and so at most {most} characters, got {got}; "
            "shorten the text or split it",
            param="input",
        )


@dataclass(frozen=True)
class TextPrompts:
    """Rules for the prompts of texts.

    Attributes:
        param: the field of the request that has the prompts.
        adds_special_tokens: whether the tokenizer adds its special tokens, such as BOS.
        max_tokens: limit on generated tokens; 1 if the request has none.
        is_limited: whether the request has a limit.
        truncation: None refuses prompts that are too long.
    """

    limits: RequestLimits
    param: str
    adds_special_tokens: bool
    max_tokens: int
    is_limited: bool
    truncation: Truncation | None = None

    @property
    def longest(self) -> int:
        return self._longest if self.truncation is None else sys.maxsize

    @property
    def _longest(self) -> int:
        return self.limits.max_model_len - self.max_tokens

    def encode(self, tokenizer: Tokenizer, texts: Texts) -> TokenIds:
        return tokenizer.encode_plain(texts, add_special_tokens=self.adds_special_tokens, truncation=self.truncation)

    def shorten(self, prompts: TokenIds) -> TokenIds:
        return shortened(prompts, self.truncation)

    def check(self, prompts: TokenIds) -> None:
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                raise InvalidRequest(
                    f"{self.param}: expected at least one token in each prompt, prompt {index} has none",
                    param=self.param,
                )
            if len(prompt) > self._longest:
                raise self._too_long(index, f"{len(prompt)} tokens")
            self.limits.check_token_ids(f"{self.param}: prompt {index}", prompt, self.param)

    def too_long(self, index: int, least: int) -> InvalidRequest:
        return self._too_long(index, f"at least {least} tokens")

    def too_many_characters(self, index: int, most: int, got: int) -> InvalidRequest:
        return self._too_long(index, f"{got} characters, of which at most {most} are tokenized")

    def _too_long(self, index: int, content: str) -> InvalidRequest:
        # Clients search for OpenAI's words.
        limit = f"max_tokens is {self.max_tokens}" if self.is_limited else "the text needs at least 1"
        return ContextTooLong(
            f"{self.param}: This model's maximum context length is {self.limits.max_model_len} tokens. However, prompt "
            f"{index} has {content}, and {limit}. Shorten the prompt{' or lower max_tokens' * self.is_limited}",
            param=self.param,
        )
