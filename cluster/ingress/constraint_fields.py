"""The fields of text requests that say what the texts must be: those of OpenAI, of vLLM old and new, and of SGLang."""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from ranklet.cluster.ingress.protocol import describe_value
from ranklet.replicas.grammar.constraint import (
    JSON_OBJECT,
    RESPONSE_FORMAT,
    Constraint,
    refusal,
    response_format,
    schema_constraint,
)
from ranklet.replicas.grammar.grammar import Grammar

MAX_CHOICES: Final = 4096
_INSTEAD_OF_EBNF: Final = "expected a grammar in Lark's form, got one with ::=. Write `start: ...`"
# Options of `structured_outputs`, and the values that change nothing.
_OPTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "disable_fallback": (True, False),  # there is none
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}


class ConstraintFields(BaseModel):
    """At most one of these fields may be given. Empty ones count as not given."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None  # vLLM's names until 0.12
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None  # SGLang's names
    regex: str | None = None

    def constraint(self) -> Constraint | None:
        """Return what the texts must be; None if no field says it.

        Raises:
            InvalidRequest: the fields contradict each other, or ask for something that is not supported.
        """
        given = {name: getattr(self, name) for name in ConstraintFields.model_fields if getattr(self, name)}
        found = [_MAKERS[name](name, value) for name, value in given.items()]
        if any(each.grammar is not None for each in found):
            found = [each for each in found if each.grammar is not None]
        if len(found) > 1:
            raise found[1].refusal(f"expected null beside {found[0].field}. Send one of the two")
        return found[0] if found else None


def _structured_outputs(field: str, value: Mapping[str, Any]) -> Constraint:
    given = {name: each for name, each in value.items() if each is not None}
    for name, each in given.items():
        if name in _OPTIONS and each not in _OPTIONS[name]:
            raise refusal(f"{field}.{name}", f"this field is not supported, got {describe_value(each)}. Leave it out")
        if name not in _OPTIONS and name not in _STRUCTURED:
            raise refusal(f"{field}.{name:.100}", f"expected one of {', '.join(_STRUCTURED)}")
    kinds = [name for name in given if name in _STRUCTURED]
    if len(kinds) != 1:
        raise refusal(field, f"expected exactly one of {', '.join(_STRUCTURED)}, got {', '.join(kinds) or 'none'}")
    (name,) = kinds
    return _STRUCTURED[name](f"{field}.{name}", given[name])


def _json(field: str, value: Any) -> Constraint:
    if isinstance(value, str):
        return Constraint(field, Grammar("json_schema", value))
    if not isinstance(value, dict):
        raise refusal(field, f"expected a JSON schema, got {describe_value(value)}")
    return schema_constraint(field, value)


def _regex(field: str, value: Any) -> Constraint:
    return Constraint(field, Grammar("regex", _text(field, value)))


def _choice(field: str, value: Any) -> Constraint:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
        raise refusal(field, f"expected a list of 1 to {MAX_CHOICES} texts, got {describe_value(value)}")
    return Constraint(field, Grammar.of_choice([_text(f"{field}[{index}]", each) for index, each in enumerate(value)]))


def _grammar(field: str, value: Any) -> Constraint:
    text = _text(field, value)
    if "::=" in text:
        raise refusal(field, _INSTEAD_OF_EBNF)
    if "%json" in text:
        raise refusal(field, "expected no schema within the grammar, got %json. Send a schema on its own")
    return Constraint(field, Grammar("lark", text))


def _json_object(field: str, value: Any) -> Constraint:
    if value is not True:
        raise refusal(field, f"expected true, got {describe_value(value)}")
    return schema_constraint(field, JSON_OBJECT)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise refusal(field, f"expected a text, got {describe_value(value)}")
    return value


def _response_format(field: str, value: Mapping[str, Any]) -> Constraint:
    return response_format(value, field)


_STRUCTURED: Final = {
    "json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar, "json_object": _json_object,
}  # fmt: skip
_MAKERS: Final = {
    RESPONSE_FORMAT: _response_format, "structured_outputs": _structured_outputs, "guided_json": _json,
    "guided_regex": _regex, "guided_choice": _choice, "guided_grammar": _grammar, "json_schema": _json, "regex": _regex,
}  # fmt: skip
