"""A lower bound on the number of a text's tokens, computed without tokenizing the text.

The weight of a byte is 1 / (bytes of the longest token that contains it). The weights of one token's bytes therefore
sum to at most 1, and a text has at least as many tokens as the sum of its weights. A normalizer changes the text first:
the weights of its input characters are derived from the weights of its output characters.
"""

import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.model.added_tokens import AddedToken

Weights = NDArray[np.float64]  # one weight for each code point

MOST_CHARACTERS_PER_TOKEN: Final = 256  # of texts whose tokens have no bound; far above that of any language
_CHUNK_CHARACTERS = 1 << 16
_ROUNDING = 1e-6  # relative; far above the rounding error of the sums
_SIGMAS = [0x3C3, 0x3C2]  # lowercase sigma and final sigma: lowercasing chooses between them by position
_KEEPS_TEXT = frozenset({"ByteLevel", "Digits", "UnicodeScripts"})  # pre-tokenizers that never drop a character
_KEEPS_TOKENS = frozenset({"ByteLevel", "BertProcessing", "RobertaProcessing"})  # post-processors
_SPLITS = frozenset({"Split", "Punctuation"})  # pre-tokenizers that drop the matches if `behavior` is "Removed"


class TokenBound:
    """Bounds the number of tokens that a Hugging Face tokenizer makes of a text.

    Args:
        backend: a `tokenizers.Tokenizer`.

    Attributes:
        longest_token_bytes: upper bound on the UTF-8 bytes of input that one token stands for; None if it cannot be
            proven.
    """

    def __init__(self, backend: Any) -> None:
        self._characters, weights = None, None
        try:
            self._characters = _characters(backend)
            weights = self._characters.before_normalizer(())
        except _UnboundedError:
            pass
        self._weights = None if weights is None else weights.astype(np.float32)
        self.longest_token_bytes = None if weights is None or not weights.all() else _longest(weights)

    def with_added(self, added: Sequence[AddedToken]) -> "TokenBound":
        """Return the bound for the tokenizer with these tokens too. Keeps only the weights that differ."""
        return _BoundWithAdded(self._characters, self._weights, added)

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on the number of tokens; 0 if none can be proven. Takes time linear in the length."""
        if self._weights is None:
            return 0
        total = 0.0
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            total += float(self._of(text[start : start + _CHUNK_CHARACTERS]).sum(dtype=np.float64))
        return math.ceil(total * (1 - _ROUNDING))

    def characters_of(self, text: str, tokens: int) -> int:
        """Return how many first characters of `text` have at least `tokens` tokens; all if that cannot be proven.

        For a tokenizer without a bound, these are `MOST_CHARACTERS_PER_TOKEN` for each token.
        """
        if self._weights is None:
            return min(len(text), tokens * MOST_CHARACTERS_PER_TOKEN)
        wanted = tokens * (1 + 2 * _ROUNDING)
        for start in range(0, len(text), _CHUNK_CHARACTERS):
            weights = self._of(text[start : start + _CHUNK_CHARACTERS])
            total = float(weights.sum(dtype=np.float64))
            if total >= wanted:
                return start + min(len(weights), int(np.searchsorted(weights.cumsum(dtype=np.float64), wanted)) + 1)
            wanted -= total
        return len(text)

    def _of(self, text: str) -> NDArray[np.float32]:
        assert self._weights is not None, "there is a bound"
        weights: NDArray[np.float32] = self._weights[_code_points(text)]
        return weights


class _BoundWithAdded(TokenBound):
    """The bound of a tokenizer with added tokens.

    Args:
        characters: of the tokenizer without them.
        weights: of the tokenizer without them.
    """

    def __init__(
        self, characters: "_Characters | None", weights: NDArray[np.float32] | None, added: Sequence[AddedToken]
    ) -> None:
        self._characters, self._weights, self.longest_token_bytes = None, None, None
        if characters is None or weights is None or any(token.lstrip or token.rstrip for token in added):
            return
        own = characters.before_normalizer([token.content for token in added])
        self.longest_token_bytes = _longest(own) if own.all() else None
        self._weights = weights
        self._codes = (own.astype(np.float32) != weights).nonzero()[0].astype(np.uint32)
        self._own = own[self._codes].astype(np.float32)

    def _of(self, text: str) -> NDArray[np.float32]:
        weights = super()._of(text)
        if len(self._codes):
            codes = _code_points(text)
            places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
            weights = np.where(self._codes[places] == codes, self._own[places], weights)
        return weights


class _UnboundedError(Exception):
    """A step of the tokenizer may drop characters, or is not supported."""


@dataclass(frozen=True)
class _Characters:
    """The weights of the characters that a normalizer has made, and the way back to those before it.

    Attributes:
        normalized: their weights, but for those of added tokens.
        steps: of the normalizer.
        added: texts of added tokens.
        normalizer: makes the text in which added tokens are looked for.
    """

    normalized: NDArray[np.float32]
    steps: Sequence[dict[str, Any]]
    added: Sequence[str]
    normalizer: Any

    def before_normalizer(self, more: Sequence[str]) -> Weights:
        """Return the weights of a text's characters if there are more added tokens."""
        added = [*self.added, *more]
        normalize = self.normalizer.normalize_str if self.normalizer else str
        weights = _capped(self.normalized.astype(np.float64), map(normalize, added))
        for step in reversed(self.steps):
            weights = _before_normalizer(step, weights)
        return _capped(weights, added)


def _characters(backend: Any) -> _Characters:
    spec = json.loads(backend.to_str())
    if not all(map(_keeps_tokens, _flat(spec["post_processor"], "processors"))):
        raise _UnboundedError
    steps = list(_flat(spec["pre_tokenizer"], "pretokenizers"))
    byte_level = bool(steps) and steps[-1]["type"] == "ByteLevel"
    if any(step["type"] == "ByteLevel" for step in steps[:-1]):
        raise _UnboundedError
    added = [token["content"] for token in spec["added_tokens"]]
    if any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"]):  # they absorb any number of spaces
        raise _UnboundedError
    weights = _by_code_point(_by_byte(_tokens(spec["model"], byte_level=byte_level)))
    for step in reversed(steps):
        weights = _before_pre_tokenizer(step, weights)
    normalizers = list(_flat(spec["normalizer"], "normalizers"))
    return _Characters(weights.astype(np.float32), normalizers, added, backend.normalizer)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _flat(step: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for child in step[children]:
        yield from _flat(child, children)


def _keeps_tokens(step: dict[str, Any]) -> bool:
    template = step["type"] == "TemplateProcessing" and any("Sequence" in piece for piece in step["single"])
    return template or step["type"] in _KEEPS_TOKENS


def _tokens(model: dict[str, Any], *, byte_level: bool) -> list[bytes]:
    """Return the bytes of each token. A model that has no token for some byte may drop text, and has no bound."""
    vocabulary = model["vocab"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _UnboundedError
    if byte_level:
        letters = byte_letters()
        if not letters.keys() <= vocabulary.keys():
            raise _UnboundedError
        return [bytes(letters[letter] for letter in token if letter in letters) for token in vocabulary]
    if not model.get("byte_fallback") or any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        raise _UnboundedError
    return [token.encode() for token in vocabulary]


def byte_letters() -> dict[str, int]:
    """Map the letters of GPT-2's byte-level vocabularies to the bytes that they spell."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _by_byte(tokens: Iterable[bytes]) -> Weights:
    weights = np.ones(256)
    seen: set[int] = set()
    for token in sorted(tokens, key=len, reverse=True):
        new = set(token) - seen
        weights[list(new)] = 1 / max(1, len(token))
        seen |= new
    return weights


def _by_code_point(by_byte: Weights) -> Weights:
    tails = by_byte[0x80:0xC0]
    two = by_byte[0xC0:0xE0, None] + tails
    three = by_byte[0xE0:0xF0, None, None] + tails[:, None] + tails
    four = by_byte[0xF0:0xF5, None, None, None] + tails[:, None, None] + tails[:, None] + tails
    parts = (by_byte[:0x80], two.ravel()[0x80:], three.ravel()[0x800:], four.ravel()[0x10000 : sys.maxunicode + 1])
    return np.concatenate(parts)


def _longest(weights: Weights) -> int:
    utf8_bytes = np.full(len(weights), 4.0)
    for end, length in ((0x10000, 3), (0x800, 2), (0x80, 1)):
        utf8_bytes[:end] = length
    return math.ceil(float((utf8_bytes / weights).max()) * (1 - _ROUNDING))


def _before_pre_tokenizer(step: dict[str, Any], weights: Weights) -> Weights:
    if step["type"] == "Metaspace":
        return _replaced(weights, " ", step["replacement"])
    if step["type"] in _KEEPS_TEXT or (step["type"] in _SPLITS and step["behavior"] != "Removed"):
        return weights
    raise _UnboundedError


def _before_normalizer(step: dict[str, Any], weights: Weights) -> Weights:
    match step:
        case {"type": "NFC" | "NFD"}:
            return _before_composition(weights, "NFD")
        case {"type": "NFKC" | "NFKD"}:
            return _before_composition(weights, "NFKD")
        case {"type": "Lowercase"}:
            return _before_lower(weights)
        case {"type": "Prepend"}:
            return weights
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if len(pattern) == 1:
            return _replaced(weights, pattern, content)
    raise _UnboundedError


def _replaced(weights: Weights, character: str, content: str) -> Weights:
    out = weights.copy()
    out[ord(character)] = min(1.0, weights[list(map(ord, content))].sum())
    return out


def _capped(weights: Weights, added: Iterable[str]) -> Weights:
    """Lower the weights so that the characters of each added token weigh at most 1 together."""
    out = weights.copy()
    for content in added:
        codes = list(set(map(ord, content)))
        out[codes] = np.minimum(out[codes], 1 / max(1, len(content)))
    return out


def _before_composition(weights: Weights, form: str) -> Weights:
    """Divide a composed character's weight among its parts, so that parts weigh no more apart than composed."""
    parts_weights = weights.copy()
    composed = _decompositions("NFD")
    np.minimum.at(
        parts_weights, composed.parts, np.repeat(weights[composed.codes] / composed.lengths, composed.lengths)
    )
    return _before_replacement(_decompositions(form), weights, parts_weights)


def _before_lower(weights: Weights) -> Weights:
    lowered = weights.copy()
    lowered[_SIGMAS] = weights[_SIGMAS].min()
    return _before_replacement(_lowercases(), lowered, lowered)


@dataclass(frozen=True)
class _Replacements:
    """The code points that a normalizer replaces, and all parts that it puts in their places, one after the other."""

    codes: NDArray[np.int64]
    parts: NDArray[np.int64]
    lengths: NDArray[np.int64]  # number of parts of each code point

    @classmethod
    def by(cls, replace: Callable[[str], str]) -> "_Replacements":
        found = ((code, list(map(ord, replace(chr(code))))) for code in range(sys.maxunicode + 1))
        codes, parts = zip(*(pair for pair in found if pair[1] != [pair[0]]), strict=True)
        return cls(np.array(codes), np.concatenate(parts), np.array(list(map(len, parts))))


def _before_replacement(replacements: _Replacements, weights: Weights, parts_weights: Weights) -> Weights:
    """Return `parts_weights`, in which a replaced character weighs no more than its parts or than in `weights`."""
    ends = replacements.lengths.cumsum()
    sums = np.add.reduceat(parts_weights[replacements.parts], ends - replacements.lengths)
    out = parts_weights.copy()
    out[replacements.codes] = np.minimum(weights[replacements.codes], sums)
    return out


@cache
def _decompositions(form: Any) -> _Replacements:
    return _Replacements.by(partial(unicodedata.normalize, form))


@cache
def _lowercases() -> _Replacements:
    return _Replacements.by(str.lower)
