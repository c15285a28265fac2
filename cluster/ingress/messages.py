"""The messages of a chat, as clients send them and as chat templates get them."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson

from ranklet.cluster.ingress.json_size import check_containers
from ranklet.cluster.ingress.protocol import describe_value
from ranklet.replicas.errors import InvalidRequest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_OR_PARTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "null"},
        {
            "type": "array",
            "items": {
                "type": "object", "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}  # fmt: skip
_CALLS = {
    "type": ["array", "null"],
    "items": {
        "type": "object", "required": ["function"],
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object", "required": ["name", "arguments"],
                "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            },
        },
    },
}  # fmt: skip
MESSAGES_SCHEMA: Final = {
    "type": "array", "minItems": 1,
    "items": {
        "type": "object", "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES)}, "content": _TEXT_OR_PARTS, "tool_calls": _CALLS,
            "tool_call_id": {"type": ["string", "null"]},
        },
    },
}  # fmt: skip


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a chat as templates read them: with text, and with the arguments of calls as objects.

    Raises:
        InvalidRequest: a message is not as expected.
    """
    if not isinstance(messages, list) or not messages:
        raise _bad_messages("", f"expected a list of at least one message, got {describe_value(messages)}")
    found = [_parse_message(f"[{index}]", message) for index, message in enumerate(messages)]
    _read_arguments(call["function"] for message in found for call in message.get("tool_calls") or ())
    return found


def _parse_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _bad_messages(where, f"expected an object with role and content, got {describe_value(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad_messages(f"{where}.role", f"expected one of {', '.join(ROLES)}, got {describe_value(role)}")
    if message.get("function_call") is not None:
        raise _bad_messages(f"{where}.function_call", "this field is not supported. Send tool_calls")
    tool = message.get("tool_call_id")
    if tool is not None and not isinstance(tool, str):
        raise _bad_messages(f"{where}.tool_call_id", f"expected a text, got {describe_value(tool)}")
    if isinstance(content, list):
        parts = [_parse_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)]
        message = {**message, "content": "\n".join(parts)}
    elif not isinstance(content, str) and (content is not None or role != "assistant"):
        raise _bad_messages(f"{where}.content", f"expected a text or text parts, got {describe_value(content)}")
    calls = message.get("tool_calls")
    if not calls:  # templates test whether the name is there
        return {name: value for name, value in message.items() if name != "tool_calls"}
    return {**message, "tool_calls": _parse_calls(f"{where}.tool_calls", role, calls)}


def _parse_part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        raise _bad_messages(
            where,
            f"expected a part of type text, got {describe_value(part if kind is None else kind)}. The model reads text",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise _bad_messages(f"{where}.text", f"expected a text, got {describe_value(text)}")
    return text


def _parse_calls(where: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list):
        raise _bad_messages(where, f"expected a list of calls of role assistant, got {describe_value(calls)}")
    return [_parse_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _parse_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise _bad_messages(f"{where}.function", f"expected an object, got {describe_value(function)}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise _bad_messages(f"{where}.function.name", f"expected a text, got {describe_value(name)}")
    if not isinstance(arguments, str | dict | None):
        raise _bad_messages(f"{where}.function.arguments", f"expected JSON as a text, got {describe_value(arguments)}")
    return {**call, "function": dict(function)}


def _read_arguments(functions: Iterable[dict[str, Any]]) -> None:
    """Turn the arguments of calls into objects. What is none stays a text: the model has written it."""
    found: Sequence[dict[str, Any]] = [each for each in functions if isinstance(each.get("arguments"), str | None)]
    check_containers("".join(each.get("arguments") or "" for each in found).encode(errors="replace"))
    for each in found:
        try:
            arguments = orjson.loads(each.get("arguments") or "{}")
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            continue
        if isinstance(arguments, dict):
            each["arguments"] = arguments


def _bad_messages(where: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"messages{where}: {reason}", param="messages")
