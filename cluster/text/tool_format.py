"""The forms in which models write calls of tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ToolFormat:
    """A form of calls, which are JSON objects with the name of a tool and its arguments.

    Attributes:
        opens: the tag before each call, or before the list of all calls.
        closes: what follows the call or the list; "" for nothing.
        arguments: the key of a call's arguments.
        is_list: whether the calls are one JSON list behind one tag.
        is_bare: whether a text that begins with a call needs no tag.
    """

    name: str
    opens: str
    closes: str
    arguments: str = "arguments"
    is_list: bool = False
    is_bare: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts that may be special tokens. Such tokens belong to the text."""
        return (self.opens, self.closes) if self.closes and not self.is_list else (self.opens,)


FORMATS: Final[Mapping[str, ToolFormat]] = {
    each.name: each
    for each in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>"),
        ToolFormat("llama3_json", "<|python_tag|>", "", arguments="parameters", is_bare=True),
        ToolFormat("mistral", "[TOOL_CALLS]", "]", is_list=True),
    )
}
# Other forms have the same tags: calls as XML, calls without JSON around their names.
_OTHER_FORMS: Final = ("<function=", "<arg_key>", "[ARGS]", "[CALL_ID]", "<|tool_call|>")
_LLAMA: Final = ("<|python_tag|>", '{"name": function name, "parameters":')


def format_of(template: str) -> ToolFormat | None:
    """Return the form of the calls that a chat template writes; None if it is not known."""
    if not shows_tools(template) or any(mark in template for mark in _OTHER_FORMS):
        return None
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if any(mark in template for mark in _LLAMA) and "parameters" in template:
        return FORMATS["llama3_json"]
    return None


def shows_tools(template: str) -> bool:
    """Return whether a chat template may write the tools into the prompt."""
    return "tools" in template
