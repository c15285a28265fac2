"""The fields of a chat that offer tools to the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from pydantic import WithJsonSchema

from ranklet.cluster.ingress.fields import TextFields
from ranklet.cluster.ingress.protocol import describe_value
from ranklet.cluster.text.answer import AnswerParts
from ranklet.cluster.text.tool_format import FORMATS, ToolFormat
from ranklet.replicas.errors import InvalidRequest

MAX_TOOLS: Final = 128
MAX_TOOLS_BYTES: Final = 256 << 10  # of all tools together, as JSON
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES: Final = ("none", "auto", "required")
_FUNCTION_KEYS: Final = frozenset({"name", "description", "parameters", "strict"})
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_FUNCTION_SCHEMA: Final = {
    "type": "object", "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
}  # fmt: skip
TOOLS_SCHEMA: Final = {
    "type": ["array", "null"], "maxItems": MAX_TOOLS,
    "items": {
        "type": "object", "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": _FUNCTION_SCHEMA},
    },
}  # fmt: skip
_CHOICE_SCHEMA: Final = {
    "anyOf": [
        {"enum": [*_CHOICES, None]},
        {
            "type": "object", "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    ]
}  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        shown: what the chat template gets.
        schema: of its arguments.
        is_strict: whether the schema is enforced also where the model may choose not to call it.
    """

    name: str
    shown: Mapping[str, Any]
    schema: Mapping[str, Any]
    is_strict: bool


@dataclass(frozen=True)
class OfferedTools:
    """The tools of a request.

    Attributes:
        tools: all of them, which the template gets.
        callable: those that the model may call.
        must_call: whether the answer has a call.
        most_calls: None for any number.
    """

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must_call: bool
    most_calls: int | None

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        return [tool.shown for tool in self.tools]

    def parts(self, tool_format: ToolFormat) -> AnswerParts:
        names = frozenset(tool.name for tool in self.callable)
        return AnswerParts(tool_format=tool_format, names=names, most_calls=self.most_calls)


class ToolFields(TextFields):
    """Fields of a chat that say which tools the model may call. `tools` and `tool_choice` are checked later."""

    tools: Annotated[Any, WithJsonSchema(TOOLS_SCHEMA)] = None
    tool_choice: Annotated[Any, WithJsonSchema(_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None

    def offered_tools(self) -> OfferedTools | None:
        """Return the tools; None if the model is offered none.

        Raises:
            InvalidRequest: a field is not as expected, or contradicts another.
        """
        tools = parse_tools(self.tools)
        choice = self.tool_choice
        chosen = _named(choice) if isinstance(choice, dict) else None
        if chosen is None and choice is not None and choice not in _CHOICES:
            raise _bad_choice(choice)
        if not tools:
            if choice in (None, "none", "auto"):
                return None
            raise InvalidRequest(
                f"tool_choice: expected null without tools, got {describe_value(choice)}. Send tools too, or leave it "
                "out",
                param="tool_choice",
            )
        if choice == "none":
            return None
        most = 1 if self.parallel_tool_calls is False else None
        if chosen is None:
            return OfferedTools(tools, tools, choice == "required", most)
        found = tuple(tool for tool in tools if tool.name == chosen)
        if not found:
            names = ", ".join(tool.name for tool in tools)
            raise InvalidRequest(
                f"tool_choice: expected the name of one of the tools ({names:.500}), got {describe_value(chosen)}",
                param="tool_choice",
            )
        return OfferedTools(tools, found, must_call=True, most_calls=1)


def parse_tools(tools: Any) -> tuple[Tool, ...]:
    """Return the checked tools of a request. Raises InvalidRequest."""
    if tools is None:
        return ()
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        got = f"{len(tools)}" if isinstance(tools, list) else describe_value(tools)
        raise _bad_tool("", f"expected a list of at most {MAX_TOOLS} tools, got {got}. Offer those that fit the chat")
    found = tuple(_parse_tool(f"[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool.name for tool in found]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise _bad_tool("", f"expected a name for each tool, got {twice!r} twice")
    size = len(orjson.dumps([tool.shown for tool in found]))
    if size > MAX_TOOLS_BYTES:
        raise _bad_tool(
            "", f"expected at most {MAX_TOOLS_BYTES} bytes of JSON, got {size}. Offer fewer or shorter ones"
        )
    return found


def check_shown(tool_format: ToolFormat | None, *, shows_tools: bool) -> ToolFormat:
    """Return the format of a model's calls.

    Args:
        shows_tools: whether the chat template writes tools into the prompt.

    Raises:
        InvalidRequest: the model cannot be offered tools.
    """
    if not shows_tools:
        raise _bad_tool(
            "",
            "expected a chat template that writes them into the prompt, got one that does not read `tools`. Put one "
            "that does into the adapter's folder or the base model's (chat_template.jinja), or send no tools",
        )
    if tool_format is None:
        raise _bad_tool(
            "",
            f"expected a chat template with a known format of calls ({', '.join(FORMATS)}), got another. Name the "
            "format in the setting text.tool_format or in the adapter's ranklet.json, or send no tools",
        )
    return tool_format


def _parse_tool(where: str, tool: Any) -> Tool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise _bad_tool(
            f"{where}.type" if isinstance(tool, dict) else where,
            f"expected a tool of type function, got {describe_value(kind if isinstance(tool, dict) else tool)}",
        )
    function = tool.get("function")
    where += ".function"
    if not isinstance(function, dict):
        raise _bad_tool(where, f"expected an object with a name, got {describe_value(function)}")
    unknown = next((key for key in function if key not in _FUNCTION_KEYS), None)
    if unknown is not None:
        raise _bad_tool(f"{where}.{unknown:.100}", "this field is not supported. Leave it out")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad_tool(
            f"{where}.name", f"expected 1 to 64 letters of ASCII, digits, _ and -, got {describe_value(name)}"
        )
    if description is not None and not isinstance(description, str):
        raise _bad_tool(f"{where}.description", f"expected a text, got {describe_value(description)}")
    is_strict = function.get("strict")
    if is_strict is not None and not isinstance(is_strict, bool):
        raise _bad_tool(f"{where}.strict", f"expected true or false, got {describe_value(is_strict)}")
    schema = _schema(f"{where}.parameters", function.get("parameters"))
    kept = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return Tool(name, {"type": "function", "function": kept}, schema, bool(is_strict))


def _schema(where: str, parameters: Any) -> Mapping[str, Any]:
    if parameters is None:
        return _NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise _bad_tool(where, f"expected a JSON schema, which is an object, got {describe_value(parameters)}")
    kind = parameters.get("type", "object")
    if kind != "object":
        raise _bad_tool(f"{where}.type", f"expected 'object', got {describe_value(kind)}")
    return {"type": "object", **parameters}


def _named(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _bad_choice(choice)
    return name


def _bad_choice(choice: Any) -> InvalidRequest:
    return InvalidRequest(
        'tool_choice: expected none, auto, required or {"type": "function", "function": {"name": ...}}, got '
        f"{describe_value(choice)}",
        param="tool_choice",
    )


def _bad_tool(where: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"tools{where}: {reason}", param="tools")
