"""Cuts a text whose tokens are truncated anyway, so that the tokenizer stops behind the limit."""

import unicodedata
from typing import Final

from ranklet.replicas.model.token_bound import TokenBound

_MARGIN: Final = 4096  # characters behind the limit, in which a place for the cut is searched
_KEPT: Final = 256  # characters of the margin that the cut leaves: the tokens beside it differ from those of the text


def beginning(text: str, tokens: int, bound: TokenBound) -> str:
    """Return the beginning of a text, with the same first `tokens` tokens."""
    if len(text) <= tokens + _MARGIN:
        return text
    start = bound.characters_of(text, tokens) + _KEPT
    places = range(start, min(len(text) - 1, start + _MARGIN))
    return text[: next((place for place in places if _is_between_words(text, place)), start + _MARGIN)]


def ending(text: str, tokens: int, bound: TokenBound) -> str:
    """Return the end of a text, with the same last `tokens` tokens."""
    if len(text) <= tokens + _MARGIN:
        return text
    start = len(text) - bound.characters_of(text[::-1], tokens) - _KEPT
    places = range(start, max(0, start - _MARGIN), -1)
    return text[next((place for place in places if _is_between_words(text, place)), max(0, start - _MARGIN)) :]


def _is_between_words(text: str, place: int) -> bool:
    """Return whether a word ends before `place`, and a blank or a punctuation mark and the next word begin there.

    Every tokenizer divides there, unless it has tokens of several words.
    """
    return (
        text[place - 1].isalpha()
        and (text[place] == " " or unicodedata.category(text[place]).startswith("P"))
        and text[place + 1].isalpha()
    )
