"""Compares how an adapter's tokenizer files encode and decode texts with how the base model's do.

Prompts are encoded, and texts decoded, with the base model's tokenizer and the tokens that the adapter's adds to it. So
an adapter's files may be copies of the base's, as other versions of the libraries save them, with added tokens, but
nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ranklet.replicas.adapters.added_tokens import (
    NAMED_TOKENS,
    BaseTokens,
    added_to,
    decoder_tokens,
    extra_tokens,
)
from ranklet.replicas.adapters.findings import show
from ranklet.replicas.adapters.vocabulary import BaseVocabulary
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.added_tokens import AddedToken
from ranklet.replicas.model.git_lfs import pointer_problem
from ranklet.replicas.model.tokenizer import load_backend
from ranklet.replicas.model.tokenizer_files import (
    MERGES_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    UnusableTokenError,
    content_of,
    read_tokenizer_file,
    read_within_bounds,
)

# Fields of tokenizer_config.json that change ids of a tokenizer.json.
_FIELDS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens", "strip_accents",
    "tokenize_chinese_chars", "fix_mistral_regex",
)  # fmt: skip
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")  # they encode as tokenizer.json says
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_REMEDY = "remove the adapter's tokenizer files if the base model's are meant"

Spec = dict[str, Any]  # what decides the ids, and the text of ids, of a tokenizer.json, by its sections


@dataclass(frozen=True)
class ComparedTokenizer:
    """What an adapter's tokenizer files have besides the base model's.

    Attributes:
        findings: why they cannot be used.
        added: tokens that they add, in the order of their ids; none if there are findings.
    """

    findings: tuple[str, ...] = ()
    added: tuple[AddedToken, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` restores. JSON has tokens as lists of their fields."""
        return {"findings": self.findings, "added": self.added}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        return cls(tuple(fields["findings"]), tuple(map(AddedToken._make, fields["added"])))


class BaseTokenizer:
    """The base model's tokenizer. Reads its files at the first comparison that needs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = BaseTokens(folder)
        self._vocabulary = BaseVocabulary(folder, self._tokens.content)

    def compare(self, folder: Path) -> ComparedTokenizer:
        """Return why an adapter's tokenizer files cannot be used, or the tokens that they add."""
        try:
            return self._compare(folder, self._tokens.content.read(folder))
        except UnusableTokenError as error:
            findings = self._findings(folder, None, ())
            return ComparedTokenizer(findings if str(error) in findings else (str(error),))

    def compare_similar(self, folder: Path) -> ComparedTokenizer | None:
        """Return `compare(folder)`; None if the adapter has no tokenizer.json, or one that must be parsed."""
        content = self._tokens.content.read_similar(folder)
        return None if content is None else self._compare(folder, content)

    def _compare(self, folder: Path, content: Spec) -> ComparedTokenizer:
        try:
            added = added_to(self._tokens, content, read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE))
        except UnusableTokenError as error:
            findings = self._findings(folder, content, ())
            return ComparedTokenizer(findings if str(error) in findings else (str(error),))
        findings = self._findings(folder, content, added)
        return ComparedTokenizer(findings) if findings else ComparedTokenizer(added=added)

    def _findings(self, folder: Path, content: Spec | None, added: tuple[AddedToken, ...]) -> tuple[str, ...]:
        try:
            return tuple(self._differences(folder, content, frozenset(token.content for token in added)))
        except UnusableTokenError as error:
            return (str(error),)

    def _differences(self, folder: Path, content: Spec | None, added: frozenset[str]) -> Iterator[str]:
        problems = [
            pointer_problem(folder / name) for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SENTENCEPIECE_FILE)
        ]
        if any(problems):
            yield from filter(None, problems)
            return
        config: dict[str, Any] = {}
        try:
            config = read_tokenizer_file(folder / TOKENIZER_CONFIG_FILE)
        except UnusableTokenError as error:
            yield str(error)
        if config:
            yield from self._config_differences(config, added)
            yield from self._flag_differences(config)
        if content or read_within_bounds(folder / TOKENIZER_FILE) is not None:
            if "added_tokens_decoder" not in config:  # it takes the place of the file
                yield from self._vocabulary.added_differences(folder, added)
            yield from self._content_differences(folder, content, added, plain=_is_plain(config))
            return
        yield from self._vocabulary.differences(folder, added)
        yield from self._old_file_differences(folder)

    def _config_differences(self, config: dict[str, Any], added: frozenset[str]) -> Iterator[str]:
        base = self._config
        for field in _FIELDS:
            if (config.get(field) or False) != (base.get(field) or False):
                yield _other(f"{TOKENIZER_CONFIG_FILE}: {field}", base.get(field), config.get(field))
        if not _is_plain(config) and _class_of(config) != _class_of(base):
            yield _other(
                f"{TOKENIZER_CONFIG_FILE}: tokenizer_class", base.get("tokenizer_class"), config["tokenizer_class"]
            )
        if config.get("add_eos_token") and _text(config.get("eos_token")) != _text(base.get("eos_token")):
            yield _other(f"{TOKENIZER_CONFIG_FILE}: eos_token", base.get("eos_token"), config.get("eos_token"))
        if config.get("add_bos_token") and _text(config.get("bos_token")) != _text(base.get("bos_token")):
            yield _other(f"{TOKENIZER_CONFIG_FILE}: bos_token", base.get("bos_token"), config.get("bos_token"))
        yield from self._unknown_tokens(config, added)

    def _unknown_tokens(self, config: dict[str, Any], added: frozenset[str]) -> Iterator[str]:
        """Yield special tokens that no file has an id of. The library would add them to the vocabulary."""
        named = [(field, config.get(field)) for field in NAMED_TOKENS if field != "eos_token"]  # checked for texts
        for field, token in (*named, *(("extra_special_tokens", each) for each in extra_tokens(config))):
            text = _text(token)
            if isinstance(text, str) and text and text not in added and text not in self._vocabulary.tokens:
                name = f"{TOKENIZER_CONFIG_FILE}: {field}"
                yield f"{name}: expected a token of the base model or of {TOKENIZER_FILE}, got {show(text)}; {_REMEDY}"

    def _flag_differences(self, config: dict[str, Any]) -> Iterator[str]:
        """Yield tokens of the base model to which `added_tokens_decoder` gives other flags."""
        for token, own in ((each.content, _flags(each._asdict())) for each in decoder_tokens(config)):
            known = self._tokens.added.get(token)
            expected = own if known is None else _flags(known._asdict())
            if own != expected and own != self._loaded_spec["added_tokens"].get(token, []):
                yield _other(f"{TOKENIZER_CONFIG_FILE}: added_tokens_decoder", {token: expected}, {token: own})

    def _content_differences(
        self, folder: Path, content: Spec | None, added: frozenset[str], *, plain: bool
    ) -> Iterator[str]:
        same_class = not plain or _is_plain(self._config)
        content = self._tokens.content.read(folder) if content is None else content
        if same_class and (self._tokens.content.is_with(content, added) or self._vocabulary.has_file_of(folder)):
            return
        found = list(self._vocabulary.differences(folder, added))
        yield from found
        if found:
            return
        own = _spec(content)
        own["added_tokens"] = {token: flags for token, flags in own["added_tokens"].items() if token not in added}
        if (same_class and own == self._stored_spec) or own == self._loaded_spec:
            return
        for section, value in own.items():
            expected = self._loaded_spec.get(section)
            if value != expected:
                yield _other(f"{TOKENIZER_FILE}: {section}", *_first_difference(expected, value))

    def _old_file_differences(self, folder: Path) -> Iterator[str]:
        """Compare the files of folders without tokenizer.json."""
        merges = read_within_bounds(folder / MERGES_FILE)
        if merges is not None and _merge_lines(merges) != self._loaded_spec["model"].get("merges", []):
            yield f"{MERGES_FILE}: expected the base model's merges; {_REMEDY}"
        own = read_within_bounds(folder / SENTENCEPIECE_FILE)
        if own is not None and own != read_within_bounds(self._folder / SENTENCEPIECE_FILE):
            yield f"{SENTENCEPIECE_FILE}: expected the base model's file; {_REMEDY}"

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_tokenizer_file(self._folder / TOKENIZER_CONFIG_FILE)

    @cached_property
    def _stored_spec(self) -> Spec:
        return _spec(self._tokens.content.fields)

    @cached_property
    def _loaded_spec(self) -> Spec:
        """Return what the base's tokenizer does once loaded: its class may change what tokenizer.json says."""
        try:
            content = json.loads(load_backend(self._folder).to_str())
        except ModelError as error:
            raise UnusableTokenError(f"{TOKENIZER_FILE}: cannot be compared with the base model's: {error}") from error
        return _spec(content)


def _other(name: str, base: Any, own: Any) -> str:
    return f"{name}: expected {show(base)} as the base model has, got {show(own)}; {_REMEDY}"


def _text(token: Any) -> Any:
    return content_of(token) if isinstance(token, dict) else token


def _class_of(config: dict[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def _is_plain(config: dict[str, Any]) -> bool:
    return _class_of(config) in ("", *_PLAIN_CLASSES)


def _spec(content: dict[str, Any]) -> Spec:
    """Return what decides the ids that a tokenizer.json gives a text, and their text, apart from the vocabulary."""
    model, added = content.get("model"), content.get("added_tokens")
    fields: dict[str, Any] = model if isinstance(model, dict) else {}
    tokens = [each for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    flags = {str(each.get("content")): _flags(each) for each in tokens}
    return {
        "normalizer": _steps(content.get("normalizer"), "normalizers"),
        "pre_tokenizer": _steps(content.get("pre_tokenizer"), "pretokenizers"),
        "post_processor": [
            # Offsets do not matter here, nor do pairs of texts.
            {key: value for key, value in step.items() if key != "pair"}
            for step in _steps(content.get("post_processor"), "processors")
            if step.get("type") != "ByteLevel"
        ],
        "model": _without_defaults(fields | {"vocab": None, "merges": _merges(fields.get("merges"))}),
        "decoder": [
            {"type": "ByteLevel"} if step.get("type") == "ByteLevel" else step  # its fields change nothing
            for step in _steps(content.get("decoder"), "decoders")
        ],
        "added_tokens": {token: value for token, value in flags.items() if value},
    }


def _flags(token: Mapping[str, Any]) -> list[str]:
    return [flag for flag in _FLAGS if token.get(flag)]


def _steps(step: Any, field: str) -> list[dict[str, Any]]:
    """Return the steps of a section in order; a step may be a sequence of others."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence" and isinstance(step.get(field), list):
        return [inner for each in step[field] for inner in _steps(each, field)]
    defaults = {"use_regex": True, "trim_offsets": True} if step.get("type") == "ByteLevel" else {}
    return [_without_defaults({**defaults, **step})]


def _without_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, False, "", [], {})}


def _merges(merges: Any) -> list[str]:
    pairs = merges if isinstance(merges, list) else []
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in pairs]


def _merge_lines(content: bytes) -> list[str]:
    lines = content.decode("utf-8", "replace").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def _first_difference(expected: Any, got: Any) -> tuple[Any, Any]:
    """Return the part of two values that differs first, so that a finding shows it."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in (*expected, *got):
            if expected.get(key) != got.get(key):
                inner = _first_difference(expected.get(key), got.get(key))
                return ({key: inner[0]}, {key: inner[1]})
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for one, other in zip(expected, got, strict=True):
            if one != other:
                return _first_difference(one, other)
    return expected, got
