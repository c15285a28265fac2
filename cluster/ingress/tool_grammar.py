"""Grammars that enforce calls of tools."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from ranklet.cluster.ingress.tool_fields import OfferedTools
from ranklet.cluster.text.answer import AnswerParts
from ranklet.cluster.text.tool_format import ToolFormat
from ranklet.replicas.grammar.call_grammar import CallForm, Lead, Tag, calls_text
from ranklet.replicas.grammar.constraint import JSON_OBJECT, Constraint, refusal
from ranklet.replicas.grammar.grammar import Grammar

SpecialId = Callable[[str], int | None]  # the id of a text that is a special token
_FIELD: Final = "tools"
# Keywords beside which `additionalProperties` would mean something else, or which say it already.
_OTHERS: Final = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "$ref", "anyOf", "oneOf"}
)


def with_calls(
    constraint: Constraint | None, offered: OfferedTools, tool_format: ToolFormat, special_id: SpecialId
) -> Constraint | None:
    """Return the constraint of a text that may call tools, or must.

    Args:
        constraint: of a text without calls.

    Raises:
        InvalidRequest: a schema is nested too deeply.
    """
    otherwise = None if constraint is None or offered.must_call else constraint.grammar
    if not offered.must_call and otherwise is None and not any(tool.is_strict for tool in offered.callable):
        return constraint
    form = _call_form(tool_format, special_id, is_single=offered.most_calls == 1)
    other = None if otherwise is None else {"kind": otherwise.kind, "text": otherwise.text}
    try:
        schemas = {
            tool.name: closed_schema(tool.schema) if offered.must_call or tool.is_strict else JSON_OBJECT
            for tool in offered.callable
        }
        text = calls_text(form, schemas, must_call=offered.must_call, otherwise=other)
    except RecursionError:
        raise refusal(_FIELD, "expected schemas that are nested less deeply") from None
    return Constraint(_FIELD, Grammar("calls", text))


def closed_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema of arguments without properties that it does not name, unless it says that there may be others.

    A function takes no others, and small models go on and on with them.
    """
    return schema if "allOf" in json.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(inner := found.get(key), Mapping):
            found[key] = {name: _closed(each) for name, each in inner.items()}
    for key in ("anyOf", "prefixItems"):
        if isinstance(listed := found.get(key), list):
            found[key] = [_closed(each) for each in listed]
    if "items" in found:
        found["items"] = _closed(found["items"])
    named, required = found.get("properties"), found.get("required", [])
    is_whole = (
        isinstance(named, Mapping)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in named for name in required)
    )
    if is_whole and not found.keys() & _OTHERS:
        found["additionalProperties"] = False
    return found


def lead_of(parts: AnswerParts, special_id: SpecialId) -> Lead | None:
    """Return the reasoning before the text that a grammar describes; None if there is none."""
    tags = parts.tags
    if tags is None or parts.stage == "answer" or parts.is_content:
        return None
    opens = Tag(tags.opens, special_id(tags.opens)) if parts.stage == "start" else None
    return Lead(opens, Tag(tags.closes, special_id(tags.closes)))


def _call_form(tool_format: ToolFormat, special_id: SpecialId, *, is_single: bool) -> CallForm:
    arguments = f'", "{tool_format.arguments}": '
    if tool_format.is_bare:  # models of this format write one call
        return CallForm(arguments=arguments, is_tagged=False)
    opens = Tag(tool_format.opens, special_id(tool_format.opens))
    if tool_format.is_list:
        between = None if is_single else ", "
        return CallForm((opens, Tag("[")), arguments=arguments, between=between, last=tool_format.closes)
    closes = Tag(tool_format.closes, special_id(tool_format.closes))
    return CallForm(
        before=(opens, Tag("\n")), arguments=arguments, after=(Tag("}\n"), closes), between=None if is_single else "\n"
    )
