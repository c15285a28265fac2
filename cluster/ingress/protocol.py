"""The OpenAI embeddings API on the wire: what a request may say, checked field by field."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from ranklet.replicas.errors import InvalidRequest

Form = TypeVar("Form", bound=BaseModel)
Texts = list[str]
TokenIds = list[NDArray[np.int32]]  # int32 [length] each
MAX_TOKEN_ID = 2**31 - 1

_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"
}  # fmt: skip
_EMPTY: dict[type, str] = {list: "an empty list", str: "an empty text"}


_INPUT = {
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


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Fields that are not here are ignored, since clients send their own."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(_INPUT)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    lora_path: str | None = None  # SGLang's way to name an adapter


def parse_request(body: bytes) -> EmbeddingsRequest:
    """Raises InvalidRequest naming the field, what was expected and what came."""
    return parse_body(body, EmbeddingsRequest)


def parse_body(body: bytes, form: type[Form]) -> Form:
    """A body as the form that a call takes. Raises as `parse_request`."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: expected JSON, got something else: {error}", param="body") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"body: expected a JSON object, got {_kind(fields)}", param="body")
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else "body"
        got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        raise InvalidRequest(f"{param}: {first['msg']}{got}", param=param) from None


def parse_input(value: Any, max_texts: int) -> Texts | TokenIds:
    """Texts, or token ids, of `input`: str | [str] | [int] | [[int]]. Never an empty list.

    Raises:
        InvalidRequest: another type, an empty text or list, a mixed list, too many texts, an impossible token id.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _bad_input(
            f"expected a text, a list of texts, a list of token ids or a list of those; got {_shown(value)}"
        )
    kinds = set(map(type, value))
    if kinds == {int}:
        return [_token_ids(value, None)]
    if len(value) > max_texts:
        raise _bad_input(f"expected at most {max_texts} texts in one request, got {len(value)}. Send several requests")
    if kinds == {str}:
        return _texts(value)
    if kinds == {list}:
        return [_token_ids(ids, index) for index, ids in enumerate(value)]
    raise _bad_input(f"expected only texts, only token ids or only lists of token ids; got a list with {_kinds(value)}")


def _texts(texts: Texts) -> Texts:
    for index, text in enumerate(texts):
        if not text:
            raise _bad_input(f"expected texts that are not empty; text {index} of {len(texts)} is empty")
    return texts


def _token_ids(ids: Any, index: int | None) -> NDArray[np.int32]:
    where = "" if index is None else f"prompt {index}: "
    if not isinstance(ids, list) or set(map(type, ids)) != {int}:
        raise _bad_input(f"{where}expected a list of at least one token id, got {_shown(ids)}")
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        bad = next(token for token in ids if not 0 <= token <= MAX_TOKEN_ID)
        raise _bad_input(f"{where}expected token ids of the model's vocabulary, got {bad}")
    return np.array(ids, dtype=np.int32)


def _bad_input(message: str) -> InvalidRequest:
    return InvalidRequest(f"input: {message}", param="input")


def _kinds(values: Sequence[Any]) -> str:
    return ", ".join(sorted({_kind(value) for value in values}))


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def _shown(value: Any) -> str:
    """A value as far as it helps: its kind, and the start of it."""
    if value is None or value == [] or value == "":
        return _EMPTY.get(type(value), "null")
    text = repr(value)
    return f"{_kind(value)} ({text if len(text) <= 60 else text[:57] + '...'})"
