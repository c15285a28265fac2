"""Reads a JSON value piece by piece, and finds the first character that is not JSON."""

import re
from typing import Final

_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')  # of a string
_SPACE: Final = " \t\r\n"
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_WORDS: Final = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS: Final = frozenset("0123456789")
# States of a number, and what each may go on with. A number may end in those of `_WHOLE`.
_NUMBER: Final = {
    "-": (("0", "0"), ("123456789", "int")),
    "0": ((".", "."), ("eE", "e")),
    "int": (("0123456789", "int"), (".", "."), ("eE", "e")),
    ".": (("0123456789", "frac"),),
    "frac": (("0123456789", "frac"), ("eE", "e")),
    "e": (("+-", "sign"), ("0123456789", "exp")),
    "sign": (("0123456789", "exp"),),
    "exp": (("0123456789", "exp"),),
}
_WHOLE: Final = ("0", "int", "frac", "exp")


class JsonValue:
    """An object or a list.

    Attributes:
        depth: number of containers that are open.
        is_complete: whether the value has ended.
        is_broken: whether the last character that came is no part of JSON.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.is_complete = False
        self.is_broken = False
        self._open: list[str] = []  # what closes each container
        self._expects = "container"
        self._rest = ""  # of a word

    def push(self, text: str, until_depth: int = 0) -> int:
        """Return how many characters belong to the value.

        Args:
            until_depth: stop where a container closes and this many stay open.
        """
        at = 0
        while at < len(text) and not self.is_complete:
            if self._expects == "string" and (plain := _PLAIN.match(text, at)):
                at = plain.end()
                continue
            closes = self.depth
            if not self._take(text[at]):
                self.is_broken = True
                return at
            at += 1
            if self.depth < closes and self.depth == until_depth:
                return at
        return at

    def _take(self, letter: str) -> bool:
        """Return whether a letter may come next."""
        state = self._expects
        if state in _NUMBER:
            found = next((to for letters, to in _NUMBER[state] if letter in letters), None)
            if found is None:
                self._expects = "more"
                return state in _WHOLE and self._take(letter)
            self._expects = found
            return True
        if state == "word":
            is_next, self._rest = letter == self._rest[0], self._rest[1:]
            self._expects = "word" if self._rest else "more"
            return is_next
        if state in ("string", "escape", "hex"):
            return self._take_in_string(state, letter)
        if letter in _SPACE:
            return True
        return self._take_mark(state, letter)

    def _take_in_string(self, state: str, letter: str) -> bool:
        if state == "string":
            if letter == '"':
                self._expects = self._after_string
            elif letter == "\\":
                self._expects = "escape"
            return letter in '"\\' or letter >= " "
        if state == "escape":
            self._rest = "hhhh"
            self._expects = "hex" if letter == "u" else "string"
            return letter in 'u"\\/bfnrt'
        self._rest = self._rest[1:]
        self._expects = "hex" if self._rest else "string"
        return letter in _HEX

    def _take_mark(self, state: str, letter: str) -> bool:
        if state == "colon":
            self._expects = "value"
            return letter == ":"
        if state == "more":
            if letter == ",":
                self._expects = "key" if self._open[-1] == "}" else "value"
                return True
            return self._close(letter)
        if letter == '"' and state != "container":
            self._after_string = "colon" if state in ("key", "key or end") else "more"
            self._expects = "string"
            return True
        if state in ("key or end", "value or end") and letter in "]}":
            return self._close(letter)
        if state in ("key", "key or end"):
            return False
        if letter in "{[":
            self._open.append("}" if letter == "{" else "]")
            self.depth += 1
            self._expects = "key or end" if letter == "{" else "value or end"
            return True
        return state != "container" and self._begin_scalar(letter)

    def _begin_scalar(self, letter: str) -> bool:
        if letter in _WORDS:
            self._expects, self._rest = "word", _WORDS[letter]
            return True
        if letter == "-" or letter in _DIGITS:
            self._expects = letter if letter in "-0" else "int"
            return True
        return False

    def _close(self, letter: str) -> bool:
        if self._open[-1] != letter:
            return False
        self._open.pop()
        self.depth -= 1
        self._expects = "more"
        self.is_complete = not self._open
        return True
