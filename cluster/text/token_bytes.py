"""The UTF-8 bytes that each token adds to a text.

A token may end within a character, so only bytes can be joined. `tokenizers.DecodeStream` works with texts instead: it
waits until the text of its last tokens ends with a complete character, and decodes all waiting tokens at each new one.
Tokens that spell no valid UTF-8, or special tokens that are skipped, make it wait for ever, and ever longer. With byte
fallback, it fails if a complete character is followed by an incomplete one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.token_bound import byte_letters

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece's byte fallback
_BYTE_LETTERS = byte_letters()
_SAMPLES = 256  # tokens that are decoded together to check the bytes


class TokenBytes(dict[int, bytes]):
    """Maps a token id to its bytes. Fills itself as ids are looked up; an unknown id has no bytes.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Attributes:
        special_ids: ids of the special tokens, which texts usually leave out.

    Raises:
        ModelError: the decoder joins tokens in a way that depends on their neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, content in added.items() if content.special)
        self._anchor, self._anchor_text = self._find_anchor()
        self._check(range(0, self._size, max(1, self._size // _SAMPLES)))

    def __missing__(self, token: int) -> bytes:
        found = self._bytes(token)
        if token < self._size or found:  # clients may send any number of unknown ids
            self[token] = found
        return found

    def first(self, token: int) -> bytes:
        """Return the bytes of a token that begins a text. Some decoders remove its leading space."""
        text = self._decode([token])
        return self[token] if REPLACEMENT in text else text.encode()

    def with_added(self, tokenizer: Any, added: Iterable[int]) -> "TokenBytes":
        """Return the bytes of a tokenizer that has added tokens too. It looks others up here.

        Raises:
            ModelError: as the constructor.
        """
        return _BytesWithAdded(self, tokenizer, added)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _bytes(self, token: int) -> bytes:
        # The anchor stands before the token, since the first token of a text may lose its leading space.
        text = self._decode([self._anchor, token]).removeprefix(self._anchor_text)
        if REPLACEMENT not in text:
            return text.encode()
        for found in _spelled(self._tokenizer.id_to_token(token) or ""):
            if found.decode(errors="replace") == text:
                return found
        return text.encode()

    def _find_anchor(self) -> tuple[int, str]:
        for token in (self._tokenizer.token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"):
            if token is None:
                continue
            one, two, three = (self._decode([token] * count) for count in (1, 2, 3))
            if 0 < len(two) - len(one) == len(three) - len(two):
                return token, one
        raise ModelError(
            "tokenizer.json: expected a token of one letter that the decoder repeats as often as it occurs"
        )

    def _check(self, tokens: Iterable[int]) -> None:
        texts = {token: self[token].decode(errors="replace") for token in tokens}
        sample = [token for token, text in texts.items() if REPLACEMENT not in text]
        if self._decode([self._anchor, *sample]) != self._anchor_text + "".join(texts[token] for token in sample):
            raise ModelError(
                "tokenizer.json: expected a decoder that joins the texts of tokens, such as ByteLevel or ByteFallback; "
                "with this one, a token's text depends on its neighbours, so that no text can be streamed"
            )


class _BytesWithAdded(TokenBytes):
    """The bytes of added tokens; those of others are looked up in `base`."""

    def __init__(self, base: TokenBytes, tokenizer: Any, added: Iterable[int]) -> None:
        self._base, self._added = base, frozenset(added)
        super().__init__(tokenizer)
        self._check(sorted(self._added))

    def __missing__(self, token: int) -> bytes:
        return super().__missing__(token) if token in self._added else self._base[token]


def _spelled(token: str) -> Iterator[bytes]:
    """Yield the bytes that a token's name may stand for."""
    if found := _BYTE_TOKEN.fullmatch(token):
        yield bytes.fromhex(found[1])
    if all(letter in _BYTE_LETTERS for letter in token):
        yield bytes(_BYTE_LETTERS[letter] for letter in token)
