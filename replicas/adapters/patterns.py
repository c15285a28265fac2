"""Patterns of an adapter's config, matched against module names exactly as PEFT does with `re`.

A pattern without metacharacters other than dots is matched here with string operations. Any other pattern is a regular
expression from an untrusted file: it may backtrack for ever with the GIL held, so `PatternMatcher` matches it in
another process.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise


class PatternShape(StrEnum):
    """How PEFT matches a pattern against a module's full name."""

    FULL = "full"  # re.fullmatch(pattern, name)
    SUFFIX = "suffix"  # re.match(rf"(.*\.)?({pattern})$", name)
    LAYER = "layer"  # re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name); idx is the layer


NO_LAYER = -1  # a match of a layer pattern in which `idx` takes no part


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern and the field of adapter_config.json that contains it."""

    field: str
    shape: PatternShape
    text: str

    @property
    def regex(self) -> str:
        """The regular expression that PEFT makes of the pattern."""
        if self.shape is PatternShape.FULL:
            return self.text
        if self.shape is PatternShape.SUFFIX:
            return rf"(.*\.)?({self.text})$"
        return rf"(?:^|.*?\.){self.text}\.(?P<idx>\d+)\."


@dataclass(frozen=True)
class PatternMatches:
    """Results for the patterns of one adapter.

    Attributes:
        layers: matched names of each pattern; their values are layer numbers for `LAYER` patterns, else 0.
        errors: reasons for which a pattern cannot be used.
    """

    layers: dict[Pattern, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    errors: dict[Pattern, str] = field(default_factory=dict)


_TOKENS = r"\\[!-/:-@\[-`{-~]|[^\\^$*+?{}\[\]|()]"  # an escaped punctuation character, or no metacharacter but a dot
_TOKEN = re.compile(_TOKENS, re.DOTALL)
_PLAIN = re.compile(f"(?:{_TOKENS})*", re.DOTALL)


@dataclass(frozen=True)
class PlainPattern:
    """A pattern of a fixed number of characters, some of which match any character.

    Attributes:
        pieces: (start, end) of the runs of literal characters.
        literal: the literal characters, joined.
    """

    pattern: Pattern
    length: int
    pieces: tuple[tuple[int, int], ...]
    literal: str

    @classmethod
    def parse(cls, pattern: Pattern) -> "PlainPattern | None":
        """None if the pattern needs a regular expression engine."""
        if not _PLAIN.fullmatch(pattern.text):
            return None
        tokens = _TOKEN.findall(pattern.text)
        wildcards = [-1, *(i for i, token in enumerate(tokens) if token == "."), len(tokens)]
        pieces = tuple((a + 1, b) for a, b in pairwise(wildcards) if a + 1 < b)
        literal = "".join(token[-1] for token in tokens if token != ".")
        return cls(pattern, len(tokens), pieces, literal)

    def matches_at(self, name: str, start: int) -> bool:
        part = name[start : start + self.length]
        return len(part) == self.length and _without_wildcards(part, self.pieces) == self.literal

    def layer_in(self, name: str) -> int | None:
        """The layer number after the first place where the pattern and a layer number follow each other."""
        for start in _starts(name):
            number, dot, _ = name[start + self.length + 1 :].partition(".")
            follows = name[start + self.length : start + self.length + 1] == "." and dot and number.isdecimal()
            if follows and self.matches_at(name, start):
                return int(number)
        return None


_Group = dict[tuple[tuple[int, int], ...], dict[str, list[Pattern]]]  # patterns by pieces and literal


def match_plain(plain: Iterable[PlainPattern], names: Iterable[str], matches: PatternMatches) -> None:
    """Enter the matches of plain patterns. Names contain no newline, which a dot would not match."""
    groups: dict[tuple[PatternShape, int], _Group] = {}
    layers = []
    for each in plain:
        if each.pattern.shape is PatternShape.LAYER:
            layers.append(each)
        else:
            group = groups.setdefault((each.pattern.shape, each.length), {})
            group.setdefault(each.pieces, {}).setdefault(each.literal, []).append(each.pattern)
    for name in names if groups or layers else ():
        for (shape, length), group in groups.items():
            start = len(name) - length
            if start == 0 or (start > 0 and shape is PatternShape.SUFFIX and name[start - 1] == "."):
                for pattern in _in_group(group, name[start:]):
                    matches.layers[pattern][name] = 0
        for each in layers:
            layer = each.layer_in(name)
            if layer is not None:
                matches.layers[each.pattern][name] = layer


def _in_group(group: _Group, part: str) -> Iterator[Pattern]:
    for pieces, by_literal in group.items():
        yield from by_literal.get(_without_wildcards(part, pieces), ())


def dotted_suffixes(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    return (name[start:] for start in _starts(name))


def _starts(name: str) -> Iterator[int]:
    yield 0
    start = name.find(".") + 1
    while start:
        yield start
        start = name.find(".", start) + 1


def _without_wildcards(part: str, pieces: tuple[tuple[int, int], ...]) -> str:
    return "".join([part[start:end] for start, end in pieces])
