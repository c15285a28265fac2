"""Token ids that end a text: those of the base model's folder, and the one that an adapter's tokenizer names.

An adapter trained on a chat format ends its texts with that format's token, which a plain base model never produces.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError

GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILE = "tokenizer.json"
# Sources of an adapter's end-of-text token. Without the first, the others are not read.
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE, TOKENIZER_FILE)
_MAX_BYTES = {TOKENIZER_FILE: 64 << 20}  # the largest known one has 33 MB
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
        return self._every_token.get(token) if found is None else found

    def added_id_of(self, token: str) -> int | None:
        """Return the id of a token without reading tokenizer.json, which may take half a second."""
        return self._added_tokens.get(token)

    @cached_property
    def _added_tokens(self) -> dict[str, int]:
        found = _ids(_read(self._folder / ADDED_TOKENS_FILE).items())
        decoder = _read(self._folder / TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            found |= _ids((_content(token), int(key)) for key, token in decoder.items() if _is_number(key))
        return found

    @cached_property
    def _every_token(self) -> dict[str, int]:
        content = _read(self._folder / TOKENIZER_FILE)
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        found: dict[str, int] = {}
        if isinstance(vocabulary, dict):
            found = _ids(vocabulary.items())
        elif isinstance(vocabulary, list):  # of a unigram model: pairs of token and score, in the order of ids
            found = _ids((pair[0], i) for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair)
        added = content.get("added_tokens")
        tokens = added if isinstance(added, list) else []
        return found | _ids((_content(token), token.get("id")) for token in tokens if isinstance(token, dict))


class EndOfText:
    """The tokens that end a text of one base model and of its adapters.

    Args:
        model_dir: the base model's folder.
        config: its transformers config.
        vocab: number of its logits.
    """

    def __init__(self, model_dir: Path, config: Any, vocab: int) -> None:
        self._dir = model_dir
        self._config = config
        self._vocab = vocab
        self._vocabulary = Vocabulary(model_dir)

    @cached_property
    def base_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text of the base model, in increasing order.

        These are all ids of `generation_config.json`, or else of `config.json`, and the tokenizer's `eos_token`. The
        latter is left out if the model has no logit for it, since it is never generated.

        Raises:
            ModelError: a file cannot be read, or its `eos_token_id` is neither an id nor a list of ids of the model.
        """
        path = self._dir / GENERATION_CONFIG_FILE
        try:
            configured = _read(path).get("eos_token_id")
            if configured is None:
                path, configured = self._dir / "config.json", getattr(self._config, "eos_token_id", None)
            ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
            if not all(_is_id(each) for each in ids):
                raise ModelError(f"{path}: eos_token_id: expected an id or a list of ids, got {_show(configured)}")
            unknown = [each for each in ids if not 0 <= each < self._vocab]
            if unknown:
                raise ModelError(
                    f"{path}: eos_token_id: expected ids from 0 to {self._vocab - 1}, which the model has logits for, "
                    f"got {_show(unknown[0])}. Correct the file"
                )
            token = _eos_token(self._dir)
            named = None if token is None else self._vocabulary.id_of(token)
        except UnusableTokenError as error:
            raise ModelError(f"{self._dir}: {error}") from error
        return tuple(sorted({each for each in (*ids, named) if each is not None and 0 <= each < self._vocab}))

    def adapter_ids(self, folder: Path) -> tuple[int, ...]:
        """Return the ids that end a text of an adapter besides those of the base model.

        This is the `eos_token` of the folder's `tokenizer_config.json`; a folder without one adds no ids. Its id is
        that of the adapter's own added tokens, or else of the base's vocabulary, or else of the adapter's
        `tokenizer.json`.

        Raises:
            UnusableTokenError: a file cannot be read, or the token has no id that the model has logits for.
        """
        token = _eos_token(folder)
        if token is None:
            return ()
        own = Vocabulary(folder)
        for find in (own.added_id_of, self._vocabulary.id_of, own.id_of):
            found = find(token)
            if found is not None:
                break
        else:
            raise UnusableTokenError(
                f"{TOKENIZER_CONFIG_FILE}: eos_token: expected a token of the base model or of the folder's tokenizer "
                f"files, got {_show(token)}, which none of them contains"
            )
        if not 0 <= found < self._vocab:
            raise UnusableTokenError(
                f"{TOKENIZER_CONFIG_FILE}: eos_token: expected an id below the base model's {self._vocab} logits, got "
                f"{found} for {_show(token)}"
            )
        return (found,)


def _eos_token(folder: Path) -> str | None:
    """Return the token of `eos_token`, which is a string, or an object with the string as its content."""
    token = _read(folder / TOKENIZER_CONFIG_FILE).get("eos_token")
    content = _content(token) if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise UnusableTokenError(f"{TOKENIZER_CONFIG_FILE}: eos_token: expected a token, got {_show(token)}")
    return content or None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else None


def _ids(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    return {token: found for token, found in pairs if isinstance(token, str) and _is_id(found)}


def _is_number(key: str) -> bool:
    return key.isdecimal() and len(key) <= _MAX_ID_DIGITS


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object. Returns an empty one if there is no such file."""
    most = _MAX_BYTES.get(path.name, _MAX_OTHER_BYTES)
    try:
        if not path.exists():
            return {}
        if not path.is_file():
            raise UnusableTokenError(f"{path.name}: expected a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UnusableTokenError(f"{path.name}: expected at most {most} bytes, got {path.stat().st_size}")
        fields = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableTokenError(f"{path.name}: expected JSON, got: {str(error)[:_MAX_SHOWN_CHARS]}") from error
    if not isinstance(fields, dict):
        raise UnusableTokenError(f"{path.name}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."
