"""Parses tokenizer.json files of the base model and of adapters, which mostly are the base's with other added tokens.

Parsing a large file takes a few tenths of a second. If all bytes but those of the added tokens are the base's, an
adapter's content is the base's with these tokens.
"""

import io
import json
import os
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_FILE,
    model_tokens,
    read_tokenizer_file,
    read_within_bounds,
)
from ranklet.replicas.regular_file import open_regular

_ADDED = "added_tokens"
_MAX_ENTRY_BYTES = 4 << 20  # more than `MAX_ADDED_TOKENS` and `MAX_ADDED_CHARS` allow
_PIECE_BYTES = 1 << 18
_ARRAY = re.compile(rb'"added_tokens"\s*:\s*\[')


class BaseContent:
    """The tokenizer.json of the base model. Reads it when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def fields(self) -> dict[str, Any]:
        return read_tokenizer_file(self._folder / TOKENIZER_FILE)

    @cached_property
    def plain_tokens(self) -> dict[str, int]:
        """Return the ids of the model, which has no added tokens."""
        return model_tokens(self.fields)

    def read(self, folder: Path) -> dict[str, Any]:
        """Return the content of an adapter's tokenizer.json; an empty one if there is none.

        Raises:
            UnusableTokenError: the file cannot be read, is too large, or is something else.
        """
        found = self.read_similar(folder)
        return read_tokenizer_file(folder / TOKENIZER_FILE) if found is None else found

    def read_similar(self, folder: Path) -> dict[str, Any] | None:
        """Return the content of an adapter's tokenizer.json; None if it must be parsed, or there is none."""
        entries = self._other_entries(folder / TOKENIZER_FILE)
        return None if entries is None else {**self.fields, _ADDED: entries}

    def plain_tokens_of(self, content: Mapping[str, Any]) -> Mapping[str, int]:
        """Return the ids of the model of an adapter's content."""
        return self.plain_tokens if self._shares_model(content) else model_tokens(content)

    def is_with(self, content: Mapping[str, Any], added: Collection[str]) -> bool:
        """Whether an adapter's content, from `read`, surely is the base's with entries for these tokens."""
        if not self._shares_model(content):
            return False
        others = [
            each for each in content[_ADDED] if not (isinstance(each, dict) and str(each.get("content")) in added)
        ]
        return json.dumps(others) == json.dumps(self.fields[_ADDED])  # in Python, 1 == True

    def _shares_model(self, content: Mapping[str, Any]) -> bool:
        return "model" in content and content["model"] is self.fields.get("model") is not None

    def _other_entries(self, path: Path) -> list[Any] | None:
        """Return the added tokens of a file that differs from the base's in nothing else; None if that is not sure."""
        if self._ends is None:
            return None
        head, tail = self._ends
        try:
            with open_regular(path) as file:
                length = os.fstat(file.fileno()).st_size - len(head) - len(tail)
                if not 0 <= length <= _MAX_ENTRY_BYTES or not _continues(file, head):
                    return None
                entries = file.read(length)
                if len(entries) < length or not _continues(file, tail) or file.read(1):
                    return None
        except OSError:
            return None  # `read` says why
        return _array(entries)

    @cached_property
    def _ends(self) -> tuple[bytes, bytes] | None:
        """Return the bytes before and behind the added tokens; None if they are not found."""
        content = read_within_bounds(self._folder / TOKENIZER_FILE)
        found = None if content is None else _ARRAY.search(content)
        if content is None or found is None:
            return None
        head, rest = content[: found.end()], content[found.end() - 1 :].decode()
        try:
            # Only the array of the outermost object can be closed so.
            if json.loads(head + b"]}")[_ADDED] != []:
                return None
            entries, stop = json.JSONDecoder().raw_decode(rest)
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        return (head, rest[stop - 1 :].encode()) if entries == self.fields.get(_ADDED) else None


def _continues(file: io.FileIO, expected: bytes) -> bool:
    """Return whether the next bytes of a file are these. Reads it in pieces, which stay in the CPU's cache."""
    piece, start = memoryview(bytearray(_PIECE_BYTES)), 0
    while start < len(expected):
        count = file.readinto(piece[: len(expected) - start])
        if not count or not expected.startswith(piece[:count], start):
            return False
        start += count
    return True


def _array(entries: bytes) -> list[Any] | None:
    try:
        found = json.loads(f"[{entries.decode()}]")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None
