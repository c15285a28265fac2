"""Grammars that enforce calls of tools."""

from collections.abc import Callable
from typing import Final

from ranklet.cluster.ingress.tool_fields import OfferedTools
from ranklet.cluster.text.answer import AnswerParts
from ranklet.cluster.text.tool_format import ToolFormat
from ranklet.replicas.grammar.call_grammar import CallForm, Lead, Tag, calls_text
from ranklet.replicas.grammar.constraint import JSON_OBJECT, Constraint, refusal
from ranklet.replicas.grammar.grammar import Grammar

SpecialId = Callable[[str], int | None]  # the id of a text that is a special token
_FIELD: Final = "tools"


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
    schemas = {
        tool.name: tool.schema if offered.must_call or tool.is_strict else JSON_OBJECT for tool in offered.callable
    }
    form = _call_form(tool_format, special_id, is_single=offered.most_calls == 1)
    other = None if otherwise is None else {"kind": otherwise.kind, "text": otherwise.text}
    try:
        text = calls_text(form, schemas, must_call=offered.must_call, otherwise=other)
    except RecursionError:
        raise refusal(_FIELD, "expected schemas that are nested less deeply") from None
    return Constraint(_FIELD, Grammar("calls", text))


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
