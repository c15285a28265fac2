"""The tokenizer files of a folder, read within bounds: an adapter's folder may come from anyone."""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ranklet.replicas.model.git_lfs import is_pointer, pointer_message
from ranklet.replicas.regular_file import TooLargeError, read_regular

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILE = "tokenizer.json"
# Of older folders without a tokenizer.json.
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE, TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE, SENTENCEPIECE_FILE,
)  # fmt: skip
_MAX_BYTES = {  # the largest known tokenizer.json has 33 MB
    TOKENIZER_FILE: 64 << 20, VOCABULARY_FILE: 16 << 20, MERGES_FILE: 16 << 20, SENTENCEPIECE_FILE: 16 << 20,
}  # fmt: skip
_MAX_OTHER_BYTES = 4 << 20
_MAX_ID_DIGITS = 10
_MAX_SHOWN_CHARS = 100


class UnusableTokenError(Exception):
    """A tokenizer file cannot be read, or its end-of-text token has no usable id; the message is the finding."""


class Vocabulary:
    """Token ids by token, from a folder's tokenizer files, which are read when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def id_of(self, token: str) -> int | None:
        """Return the id of a token; None if no file contains it.

        Raises:
            UnusableTokenError: a file cannot be read.
        """
        found = self.added_id_of(token)
        return (self.every_token or self.plain_tokens).get(token) if found is None else found

    def added_id_of(self, token: str) -> int | None:
        """Return the id of a token without reading tokenizer.json, which may take half a second."""
        return self.added_tokens.get(token)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Return the ids of added_tokens.json and tokenizer_config.json."""
        found = _ids(read_tokenizer_file(self._folder / ADDED_TOKENS_FILE).items())
        decoder = read_tokenizer_file(self._folder / TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            found |= _ids((content_of(token), int(key)) for key, token in decoder.items() if is_number(key))
        return found

    @cached_property
    def plain_tokens(self) -> dict[str, int]:
        """Return the ids of vocab.json, which has no added tokens."""
        return _ids(read_tokenizer_file(self._folder / VOCABULARY_FILE).items())

    @cached_property
    def every_token(self) -> dict[str, int]:
        """Return the ids of tokenizer.json, added tokens included."""
        content = read_tokenizer_file(self._folder / TOKENIZER_FILE)
        return model_tokens(content) | added_ids(content)


def added_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the added tokens of a tokenizer.json."""
    added = content.get("added_tokens")
    tokens = added if isinstance(added, list) else []
    return _ids((content_of(token), token.get("id")) for token in tokens if isinstance(token, dict))


def model_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the model of a tokenizer.json, which has no added tokens."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return _ids(vocabulary.items())
    if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score, in the order of ids
        return _ids((pair[0], i) for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair)
    return {}


def content_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else None


def _ids(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    return {token: found for token, found in pairs if isinstance(token, str) and is_id(found)}


def is_number(key: str) -> bool:
    return key.isdecimal() and len(key) <= _MAX_ID_DIGITS


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tokenizer_file(path: Path) -> dict[str, Any]:
    """Read a JSON object. Returns an empty one if there is no such file.

    Raises:
        UnusableTokenError: the file cannot be read, is too large, or is something else.
    """
    try:
        content = read_within_bounds(path)
        if content is not None and is_pointer(content):
            raise UnusableTokenError(pointer_message(path.name))
        fields = {} if content is None else json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableTokenError(f"{path.name}: expected JSON, got: {str(error)[:_MAX_SHOWN_CHARS]}") from error
    if not isinstance(fields, dict):
        raise UnusableTokenError(f"{path.name}: expected a JSON object, got {type(fields).__name__}")
    return fields


def read_within_bounds(path: Path) -> bytes | None:
    """Read a file of limited size. Returns None if there is no such file.

    Raises:
        UnusableTokenError: it is no file, or too large.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise UnusableTokenError(f"{path.name}: expected a file")
    most = _MAX_BYTES.get(path.name, _MAX_OTHER_BYTES)
    try:
        return read_regular(path, most)
    except TooLargeError as error:
        raise UnusableTokenError(f"{path.name}: {error.strerror}") from error


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."
