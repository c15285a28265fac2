"""Reads the tokens that an adapter's tokenizer has besides those of the base model.

Training tools add tokens to the base model's tokenizer and save it beside the adapter. Ids follow from the order in
which the library adds tokens, so those of the files are compared with them.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ranklet.replicas.adapters.findings import Checked, join
from ranklet.replicas.adapters.tokenizer_content import BaseContent
from ranklet.replicas.model.added_tokens import MAX_ADDED_TOKENS, AddedToken
from ranklet.replicas.model.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    UnusableTokenError,
    Vocabulary,
    content_of,
    is_id,
    is_number,
    read_tokenizer_file,
    show,
)

MAX_TOKEN_CHARS: Final = 256
MAX_ADDED_CHARS: Final = 1 << 17  # of all added tokens of an adapter together
NAMED_TOKENS: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class BaseTokens:
    """The tokens of the base model's folder. Reads its files when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.content = BaseContent(folder)

    @cached_property
    def plain(self) -> Mapping[str, int]:
        """Return the ids of the tokens that the tokenizer's model makes of a text, by token."""
        return self.content.plain_tokens or Vocabulary(self._folder).plain_tokens

    @cached_property
    def added(self) -> Mapping[str, AddedToken]:
        config = read_tokenizer_file(self._folder / TOKENIZER_CONFIG_FILE)
        return listed_tokens(self.content.fields, config, self.plain)


def read_added_tokens(folder: Path, base: BaseTokens) -> tuple[AddedToken, ...]:
    """Return the tokens that an adapter's tokenizer files add to the base model's, in the order of their ids.

    Other differences between the files are not looked for.

    Raises:
        UnusableTokenError: a file cannot be read, the tokens are too many or too long, or their ids are not those that
            the library gives them.
    """
    return added_to(base, base.content.read(folder), read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE))


def added_to(base: BaseTokens, content: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Return the tokens that the contents of tokenizer.json and tokenizer_config.json add; see `read_added_tokens`."""
    if not content and not config:
        return ()
    own = base.content.plain_tokens_of(content)
    found = [
        token
        for token in listed_tokens(content, config, base.plain).values()
        # A token of another model than the base's is a difference of the models.
        if token.content not in base.added and (token.content not in own or token.content in base.plain)
    ]
    _check_sizes(found)
    _check_ids(found, base)
    return tuple(sorted(found, key=lambda token: token.id))


def check_rows(added: Iterable[AddedToken], rows: int) -> Checked[None]:
    """Yield a finding about added tokens that have no row of the token embedding.

    Args:
        rows: of the adapter's token embedding: the base model's and its own beyond them.
    """
    beyond = [f"{show(token.content)} ({token.id})" for token in added if token.id >= rows]
    if beyond:
        yield (
            f"{TOKENIZER_FILE}: added_tokens: expected ids below {rows}, the number of rows of the base model's token "
            f"embedding and of those that the adapter brings; {len(beyond)} lie beyond: {join(beyond)}"
        )


def listed_tokens(
    content: Mapping[str, Any], config: Mapping[str, Any], plain: Mapping[str, int]
) -> dict[str, AddedToken]:
    """Return the added tokens that transformers makes of tokenizer.json and tokenizer_config.json, by content.

    Args:
        plain: ids of the tokenizer's model. A special token that the config names becomes an added token with its id.
    """
    added = content.get("added_tokens")
    found = {token.content: token for token in _tokens((each, each.get("id")) for each in _objects(added))}
    for token in decoder_tokens(config):
        known = found.get(token.content)
        found[token.content] = token if known is None else token._replace(id=known.id)
    for text in named_texts(config):
        if text not in found and text in plain:
            found[text] = AddedToken(text, plain[text], special=True)
    return found


def decoder_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the tokens of the `added_tokens_decoder` of a tokenizer_config.json, in the order of their ids."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbered = ((int(key), each) for key, each in decoder.items() if is_number(key))
        yield from _tokens((each, number) for number, each in sorted(numbered, key=lambda pair: pair[0]))


def named_texts(config: Mapping[str, Any]) -> list[str]:
    """Return the texts of the special tokens that a tokenizer_config.json names."""
    tokens = [config.get(name) for name in NAMED_TOKENS] + extra_tokens(config)
    texts = (content_of(token) if isinstance(token, dict) else token for token in tokens)
    return [text for text in texts if isinstance(text, str) and text]


def extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []


def _tokens(entries: Iterable[tuple[Any, Any]]) -> Iterator[AddedToken]:
    """Yield the tokens of JSON objects and their ids."""
    for entry, number in entries:
        text = content_of(entry)
        if isinstance(text, str) and is_id(number):
            special, normalized = entry.get("special") is True, entry.get("normalized")
            yield AddedToken(
                text,
                number,
                special=special,
                lstrip=entry.get("lstrip") is True,
                rstrip=entry.get("rstrip") is True,
                single_word=entry.get("single_word") is True,
                normalized=normalized if isinstance(normalized, bool) else not special,
            )


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _check_sizes(tokens: list[AddedToken]) -> None:
    name = f"{TOKENIZER_FILE}: added_tokens"
    if len(tokens) > MAX_ADDED_TOKENS:
        raise UnusableTokenError(
            f"{name}: expected at most {MAX_ADDED_TOKENS} tokens besides the base model's, got {len(tokens)}"
        )
    for token in tokens:
        if not 1 <= len(token.content) <= MAX_TOKEN_CHARS:
            raise UnusableTokenError(
                f"{name}: expected tokens of 1 to {MAX_TOKEN_CHARS} characters, {token.id} has {len(token.content)}"
            )
        try:
            token.content.encode()
        except UnicodeEncodeError as error:
            raise UnusableTokenError(f"{name}: expected Unicode texts, {token.id} is {show(token.content)}") from error
    total = sum(len(token.content) for token in tokens)
    if total > MAX_ADDED_CHARS:
        raise UnusableTokenError(
            f"{name}: expected at most {MAX_ADDED_CHARS} characters besides the base model's, got {total}"
        )


def _check_ids(tokens: list[AddedToken], base: BaseTokens) -> None:
    last = max((token.id for token in base.added.values()), default=-1)
    for token in tokens:
        expected = base.plain.get(token.content)
        if expected is None:
            expected = last + 1 if last >= len(base.plain) else len(base.plain)
        if token.id != expected:
            raise UnusableTokenError(
                f"{TOKENIZER_FILE}: added_tokens: expected the id {expected} for {show(token.content)}, which the "
                f"base model's tokenizer gives it, got {token.id}. Add the tokens to the base model's tokenizer, and "
                "save it again"
            )
        last = max(last, expected)
