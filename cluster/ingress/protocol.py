"""Parses and checks the JSON of requests. Each error names the field, the expected value and the value received."""

import codecs
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from ranklet.cluster.ingress.json_size import check_containers
from ranklet.replicas.engine.limits import OTHER_VOCABULARY
from ranklet.replicas.errors import InvalidRequest

Form = TypeVar("Form", bound=BaseModel)
Texts = list[str]
TokenIds = list[NDArray[np.int32]]  # int32 [length] each
_MAX_TOKEN_ID = 2**31 - 1
_MAX_IDS: Final = 1 << 20  # in one prompt; longer than the context of any model

INPUT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array", "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}  # fmt: skip

_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"
}  # fmt: skip
_BRIEF = reprlib.Repr()  # reads the beginning of a large value only
_BRIEF.maxstring = _BRIEF.maxother = 120
_EMPTY: dict[type, str] = {list: "an empty list", str: "an empty text"}


def parse_body(body: bytes, form: type[Form]) -> Form:
    """Parse a JSON body into a pydantic model. Raises InvalidRequest."""
    return validate(parse_object(body), form)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON body. Raises InvalidRequest."""
    check_containers(body)
    try:
        fields = orjson.loads(body.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: expected JSON, got {_other_content(body) or f'{error}'}", param="body") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"body: expected a JSON object, got {_kind(fields)}", param="body")
    return fields


def _other_content(body: bytes) -> str | None:
    """Return what a body is instead of JSON, by its beginning; None for JSON with a mistake."""
    if not body.strip():
        return "an empty body"
    if body.startswith(b"\x1f\x8b"):
        return "gzip. Set the header Content-Encoding: gzip"
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16. Send UTF-8"
    try:
        beginning = body.decode().lstrip()[:40]
    except UnicodeDecodeError as error:
        return f"bytes that are not UTF-8, at byte {error.start}"
    if beginning.startswith("--") or re.match(r"[\w.-]+=", beginning):
        return "a form. Send JSON, with the header Content-Type: application/json"
    if beginning.startswith(("'", "{'")):
        return "single quotes. JSON has double quotes"
    return None


def validate(fields: Mapping[str, Any], form: type[Form]) -> Form:
    """Make a pydantic model of the fields of a request. Raises InvalidRequest."""
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else "body"
        got = "" if first["type"] == "missing" else f", got {describe_value(first['input'])}"
        raise InvalidRequest(f"{param}: {first['msg']}{got}", param=param) from None


def parse_input(value: Any, max_texts: int, param: str = "input") -> Texts | TokenIds:
    """Parse texts or token ids: str | [str] | [int] | [[int]]. The result is not empty.

    Args:
        param: the field of the request.

    Raises:
        InvalidRequest: another type, an empty text or list, a mixed list, too many texts, or a token id out of range.
    """
    try:
        return _parse_input(value, max_texts, param)
    except _UnusableInputError as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None


def check_count(values: Sequence[Any], max_texts: int, param: str) -> None:
    """Raise InvalidRequest if a field of a request has too many texts."""
    if len(values) > max_texts:
        raise InvalidRequest(
            f"{param}: expected at most {max_texts} texts in one request, got {len(values)}. Send several requests",
            param=param,
        )


class _UnusableInputError(Exception):
    pass


def _parse_input(value: Any, max_texts: int, param: str) -> Texts | TokenIds:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _UnusableInputError(
            f"expected a text, texts, token ids or lists of token ids; got {describe_value(value)}"
        )
    kinds = set(map(type, value[: _MAX_IDS + 1]))
    if kinds == {int}:
        return [_token_ids(value, None)]
    check_count(value, max_texts, param)
    if kinds == {str}:
        return _texts(value)
    if kinds == {list}:
        return [_token_ids(ids, index) for index, ids in enumerate(value)]
    raise _UnusableInputError(
        f"expected only texts, only token ids or only lists of token ids; got a list with {_kinds(value)}"
    )


def _texts(texts: Texts) -> Texts:
    for index, text in enumerate(texts):
        if not text:
            raise _UnusableInputError(f"expected no empty texts, text {index} of {len(texts)} is empty")
    return texts


def _token_ids(ids: Any, index: int | None) -> NDArray[np.int32]:
    where = "" if index is None else f"prompt {index}: "
    if not isinstance(ids, list) or set(map(type, ids[: _MAX_IDS + 1])) != {int}:
        raise _UnusableInputError(f"{where}expected a list of at least one token id, got {describe_value(ids)}")
    if len(ids) > _MAX_IDS:
        raise _UnusableInputError(f"{where}expected at most {_MAX_IDS} token ids in one prompt, got {len(ids)}")
    if min(ids) < 0 or max(ids) > _MAX_TOKEN_ID:
        bad = next(token for token in ids if not 0 <= token <= _MAX_TOKEN_ID)
        raise _UnusableInputError(f"{where}expected token ids of the model's vocabulary, got {bad}. {OTHER_VOCABULARY}")
    return np.array(ids, dtype=np.int32)


def _kinds(values: Sequence[Any]) -> str:
    return ", ".join(sorted({_kind(value) for value in values}))


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def describe_value(value: Any) -> str:
    """Return the kind of a value of JSON, and its beginning."""
    if value is None or value == [] or value == "":
        return _EMPTY.get(type(value), "null")
    text = _BRIEF.repr(value)
    return f"{_kind(value)} ({text if len(text) <= 60 else text[:57] + '...'})"
