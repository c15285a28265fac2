"""The schemas within a JSON schema, and their paths."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

_ONE = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
_SAME = ("allOf", "anyOf", "oneOf")  # their schemas describe the same value


class Subschema(NamedTuple):
    """A schema, and its JSON pointer in the whole one, such as #/properties/name."""

    path: str
    schema: dict[str, Any]


def subschemas(schema: Any, path: str = "#") -> Iterator[Subschema]:
    """Yield a schema and all schemas within it, outer ones first."""
    waiting = [(path, schema)]
    while waiting:
        path, schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield Subschema(path, schema)
        waiting += reversed(list(_within(path, schema)))


def of_same_value(root: Any, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema, and those that it applies to the same value: by allOf, anyOf, oneOf and $ref."""
    waiting, seen = [schema], set[int]()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        for name in _SAME:
            if isinstance(schema.get(name), list):
                waiting += schema[name]
        waiting.append(_target(root, schema.get("$ref")))


def _target(root: Any, reference: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for key in filter(None, reference[1:].split("/")):
        name = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and name.isdecimal() and int(name) < len(root):
            root = root[int(name)]
        else:
            root = root.get(name) if isinstance(root, dict) else None
    return root


def _within(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in schema.items():
        if name in _ONE and isinstance(value, dict):
            yield f"{path}/{name}", value
        elif name in _LISTS and isinstance(value, list):
            yield from ((f"{path}/{name}/{index}", each) for index, each in enumerate(value))
        elif name in _MAPS and isinstance(value, dict):
            yield from ((f"{path}/{name}/{_escaped(key)}", each) for key, each in value.items())


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
