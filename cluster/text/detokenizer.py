"""Turns the token ids of one choice into text, token by token."""

import codecs
from collections.abc import Sequence

from ranklet.cluster.text.token_bytes import TokenBytes

_decoder = codecs.getincrementaldecoder("utf-8")
_CHARACTER_TOKENS = 3  # tokens that may hold the bytes of an incomplete character


class Detokenizer:
    """The text that follows a prompt.

    Bytes that are no valid UTF-8 become U+FFFD. If the prompt ends within a character that the tokens complete, the
    whole character belongs to the text.

    Args:
        prompt_ids: the tokens before the text; empty if the text begins with the first token.
        skip_special: leave out special tokens.
        shown_ids: special tokens that are not left out.
    """

    def __init__(
        self, token_bytes: TokenBytes, prompt_ids: Sequence[int] = (), *, skip_special: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self._bytes = token_bytes
        self._skipped = token_bytes.special_ids - shown_ids if skip_special else frozenset[int]()
        self._decoder = _decoder("replace")
        tail = self._last_bytes(prompt_ids)
        self._has_begun = bool(tail)
        self._decoder.decode(tail)

    @property
    def is_within_character(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """Return the text that the token completes; "" while a character is incomplete."""
        if token in self._skipped:
            return ""
        if self._has_begun:
            return self._decoder.decode(self._bytes[token])
        self._has_begun = bool(self._bytes[token])
        return self._decoder.decode(self._bytes.first(token))

    def finish(self) -> str:
        """Return U+FFFD in place of an incomplete character."""
        return self._decoder.decode(b"", final=True)

    def _last_bytes(self, prompt_ids: Sequence[int]) -> bytes:
        found: list[bytes] = []
        for position in range(len(prompt_ids) - 1, -1, -1):
            token = int(prompt_ids[position])
            content = b"" if token in self._skipped else self._bytes[token]
            if content:
                found.append(content)
            if len(found) == _CHARACTER_TOKENS:
                break
        return b"".join(reversed(found))
