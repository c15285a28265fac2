"""What a request, or an adapter's folder, says that texts must be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.grammar import Grammar

RESPONSE_FORMAT: Final = "response_format"
JSON_OBJECT: Final = {"type": "object"}
_TYPES = ("text", "json_object", "json_schema")
_SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})  # a schema is enforced whether strict or not


@dataclass(frozen=True)
class Constraint:
    """A field that says what texts must be.

    Attributes:
        field: its name, with the path of the grammar within it.
        grammar: None allows any text.
    """

    field: str
    grammar: Grammar | None

    def refusal(self, reason: str) -> InvalidRequest:
        return refusal(self.field, reason)


def response_format(value: Mapping[str, Any], field: str = RESPONSE_FORMAT) -> Constraint:
    """Return the constraint of OpenAI's `response_format`. Raises InvalidRequest."""
    kind = value.get("type")
    if kind not in _TYPES:
        raise refusal(f"{field}.type", f"expected {', '.join(_TYPES[:-1])} or {_TYPES[-1]}, got {kind!r:.100}")
    unknown = next((name for name in value if name not in ("type", "json_schema")), None)
    if unknown is not None:
        raise refusal(f"{field}.{unknown:.100}", "this field is not supported. Send a schema as json_schema.schema")
    given = value.get("json_schema")
    if kind != "json_schema":
        if given is not None:
            raise refusal(f"{field}.json_schema", f"expected null beside the type {kind}. Use the type json_schema")
        return Constraint(field, None if kind == "text" else Grammar.of_schema(JSON_OBJECT))
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise refusal(f"{field}.json_schema.schema", "expected a JSON schema, which is an object")
    unknown = next((name for name in given if name not in _SCHEMA_KEYS), None)
    if unknown is not None:
        raise refusal(f"{field}.json_schema.{unknown:.100}", "this field is not supported. Leave it out")
    return schema_constraint(f"{field}.json_schema.schema", given["schema"])


def schema_constraint(field: str, schema: Any) -> Constraint:
    """Return the constraint of a JSON schema. Raises InvalidRequest."""
    try:
        return Constraint(field, Grammar.of_schema(schema))
    except RecursionError:
        raise refusal(field, "expected a schema that is nested less deeply") from None


def refusal(field: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {reason}", param=field.partition(".")[0])
