"""Compares an adapter's vocabulary with the base model's, since only added tokens may differ."""

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

from ranklet.replicas.adapters.tokenizer_content import BaseContent
from ranklet.replicas.model.tokenizer_files import (
    ADDED_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    UnusableTokenError,
    Vocabulary,
    added_ids,
    read_within_bounds,
    show,
)

_MAX_NAMED = 5


class BaseVocabulary:
    """The vocabulary of the base model. Reads its files at the first comparison that needs them.

    Args:
        content: of the same folder.
    """

    def __init__(self, folder: Path, content: BaseContent | None = None) -> None:
        self._folder = folder
        self._content = content or BaseContent(folder)
        self._vocabulary = Vocabulary(folder)

    def differences(self, folder: Path, added: Collection[str] = ()) -> tuple[str, ...]:
        """Return why an adapter's tokenizer files do not fit; nothing if they fit or there are none.

        A `tokenizer.json` must have the base model's tokens and no others. It is not parsed if its bytes are the base
        model's. Without one, the other files may list some of the base model's tokens.

        Args:
            added: tokens that the adapter adds to the base model's.
        """
        try:
            return tuple(self._differences(folder, frozenset(added)))
        except UnusableTokenError as error:
            return (str(error),)

    def added_differences(self, folder: Path, added: Collection[str] = ()) -> tuple[str, ...]:
        """Return why the added_tokens.json beside an adapter's `tokenizer.json` does not fit.

        The library adds its tokens to those of `tokenizer.json`.
        """
        try:
            listed = _without(Vocabulary(folder).added_tokens, frozenset(added))
            found = _difference(ADDED_TOKENS_FILE, listed, self.tokens, complete=False) if listed else None
        except UnusableTokenError as error:
            return (str(error),)
        return (found,) if found else ()

    def has_file_of(self, folder: Path) -> bool:
        """Return whether an adapter's `tokenizer.json` has the bytes of the base model's."""
        own = _hash(folder / TOKENIZER_FILE)
        return own is not None and own == self._hash

    def _differences(self, folder: Path, added: frozenset[str]) -> list[str]:
        stored = _hash(folder / TOKENIZER_FILE)
        if stored is not None:
            if stored == self._hash:
                return []
            own_tokens = _without(Vocabulary(folder).every_token, added)
            found = _difference(TOKENIZER_FILE, own_tokens, _without(self.tokens, added), complete=True)
            return [found] if found else []
        own = Vocabulary(folder)
        listed = {
            VOCABULARY_FILE: own.plain_tokens,
            f"{ADDED_TOKENS_FILE}, {TOKENIZER_CONFIG_FILE}": own.added_tokens,
        }
        others = ((name, _without(tokens, added)) for name, tokens in listed.items())
        compared = (_difference(name, tokens, self.tokens, complete=False) for name, tokens in others if tokens)
        return [found for found in compared if found]

    @cached_property
    def _hash(self) -> bytes | None:
        return _hash(self._folder / TOKENIZER_FILE)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Return the base model's tokens.

        Raises:
            UnusableTokenError: it has no JSON file of them.
        """
        found = self._content.plain_tokens | added_ids(self._content.fields) or self._vocabulary.plain_tokens
        if not found:
            raise UnusableTokenError(
                f"{TOKENIZER_FILE}: cannot be compared, since the base model has neither {TOKENIZER_FILE} nor "
                f"{VOCABULARY_FILE}. Remove the adapter's tokenizer files"
            )
        return found | self._vocabulary.added_tokens


def _hash(path: Path) -> bytes | None:
    try:
        content = read_within_bounds(path)
    except OSError as error:
        raise UnusableTokenError(f"{path.name}: cannot be read: {error.strerror}") from error
    return None if content is None else hashlib.sha256(content).digest()


def _without(tokens: Mapping[str, int], added: frozenset[str]) -> Mapping[str, int]:
    return {token: found for token, found in tokens.items() if token not in added} if added else tokens


def _difference(name: str, own: Mapping[str, int], base: Mapping[str, int], *, complete: bool) -> str | None:
    tokens = {token for token, found in own.items() if base.get(token) != found}
    tokens |= base.keys() - own.keys() if complete else set()
    differing = sorted(tokens, key=lambda token: (own.get(token, base.get(token, 0)), token))
    if not differing:
        return None
    named = "; ".join(_named(token, own.get(token), base.get(token)) for token in differing[:_MAX_NAMED])
    more = f"; and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
    return (
        f"{name}: expected the ids of the base model's {len(base)} tokens, to which an adapter's tokenizer may only "
        f"add others; {len(differing)} differ: {named}{more}"
    )


def _named(token: str, own: int | None, base: int | None) -> str:
    if own is None:
        return f"{show(token)} is missing (base model: {base})"
    return f"{show(token)} is {own} ({'not in the base model' if base is None else f'base model: {base}'})"
