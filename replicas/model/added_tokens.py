"""Tokens that an adapter's tokenizer has besides those of the base model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MAX_ADDED_TOKENS: Final = 4096  # of an adapter


class AddedToken(NamedTuple):
    """A token that is looked for in a text before the rest of the text is tokenised.

    Attributes:
        special: whether texts usually leave it out.
        lstrip: whether it takes the spaces before it.
        rstrip: whether it takes the spaces behind it.
        single_word: whether it counts only where no word goes on.
        normalized: whether it is looked for in the normalized text.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class AddedTokens:
    """The added tokens of a tokenizer, in the order of their ids. Equal ones have equal digests.

    Attributes:
        digest: of the tokens; "" if there are none.
    """

    tokens: tuple[AddedToken, ...] = field(default=(), compare=False)
    digest: str = ""

    @classmethod
    def of(cls, tokens: Sequence[AddedToken]) -> "AddedTokens":
        if not tokens:
            return cls()
        content = json.dumps(list(tokens))
        return cls(tuple(tokens), hashlib.sha256(content.encode()).hexdigest())

    @property
    def end(self) -> int:
        """Return the number behind the highest id; 0 without tokens."""
        return self.tokens[-1].id + 1 if self.tokens else 0
