"""Tools of chats at a gateway: calls are enforced, answered apart from the text, or refused by name."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.config import TextConfig
from ranklet.cluster.ingress.tool_fields import MAX_TOOLS
from ranklet.cluster.ingress.tool_grammar import closed_schema
from ranklet.replicas.grammar.grammar import NOT_INSTALLED
from tests.cluster.ingress.tool_parts import (
    ADD,
    CALL,
    NOW,
    SCHEMA,
    USER,
    WritingGateway,
    grammar_of,
    joined,
    refusal,
    streamed,
    whole,
)  # fmt: skip


@pytest.fixture
async def make_parts(tmp_path: Path) -> AsyncIterator[WritingGateway]:
    made = WritingGateway(tmp_path)
    yield made
    made.stop()


async def test_a_call_is_apart_from_the_text(make_parts: WritingGateway) -> None:
    parts = make_parts(f"I add.{CALL}\n{CALL}")
    choice = await whole(parts, tools=[ADD, NOW])
    message = choice["message"]
    assert message["content"] == "I add."
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": '{"a": 5}'}] * 2
    assert all(call["type"] == "function" and len(call["id"]) == 9 for call in message["tool_calls"])
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"
    assert grammar_of(parts) is None


async def test_a_streamed_call_is_that_of_the_whole_answer(make_parts: WritingGateway) -> None:
    parts = make_parts(f"\n{CALL}")
    choices = await streamed(parts, tools=[ADD])
    found = joined(choices)
    message = (await whole(parts, tools=[ADD]))["message"]
    assert message["content"] is None
    assert found["content"] == ""
    assert [call["function"] for call in found["tool_calls"]] == [call["function"] for call in message["tool_calls"]]
    pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [piece["function"].get("name") for piece in pieces] == ["add"] + [None] * (len(pieces) - 1)
    assert len(pieces) > 2, "the arguments come in pieces"
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("text", "fields", "content"),
    [
        (CALL, {"tool_choice": "none", "tools": [ADD]}, CALL),
        (CALL, {"tool_choice": "auto"}, CALL),
        (CALL, {"tools": []}, CALL),
        (CALL, {"tools": [NOW]}, CALL),
        (f"{CALL}{CALL}", {"tools": [ADD], "parallel_tool_calls": False}, CALL),
    ],
)
async def test_what_is_no_wanted_call_is_content(
    make_parts: WritingGateway, text: str, fields: dict[str, Any], content: str
) -> None:
    assert (await whole(make_parts(text), **fields))["message"]["content"] == content


async def test_special_tokens_of_calls_are_read(make_parts: WritingGateway) -> None:
    parts = make_parts(CALL, special=["<tool_call>", "</tool_call>"])
    assert (await whole(parts, tools=[ADD]))["message"]["tool_calls"][0]["function"]["name"] == "add"
    assert "<tool_call>" not in (await whole(parts))["message"]["content"]


async def test_templates_get_tools_calls_and_their_results(make_parts: WritingGateway) -> None:
    calls = [{"id": "abc", "type": "function", "function": {"name": "add", "arguments": '{"a": 5}'}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "abc", "content": "6"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":'}}]},
    ]
    parts = make_parts()
    strict = {"type": "function", "function": {**ADD["function"], "strict": False}}
    await whole(parts, tools=[strict], messages=messages)
    (prompt,) = parts.replica.calls[-1].prompts()
    assert parts.texts.tokens.backend.decode(prompt.tolist()) == (
        f"{json.dumps(ADD)}user:Add."
        'assistant:<tool_call>{"name": "add", "arguments": {"a": 5}}</tool_call>tool:6abc'
        'assistant:<tool_call>{"name": "add", "arguments": "{\\"a\\":"}</tool_call>True'
    )


async def test_documents_reach_a_template_that_reads_them(make_parts: WritingGateway) -> None:
    parts = make_parts()
    await whole(parts, documents=[{"text": "Norway"}])
    (prompt,) = parts.replica.calls[-1].prompts()
    assert parts.texts.tokens.backend.decode(prompt.tolist()).startswith("[{'text': 'Norway'}]")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": {}}, "tools", "tools: expected a list of at most 128 tools, got an object"),
        ({"tools": [NOW] * (MAX_TOOLS + 1)}, "tools", "got 129"),
        ({"tools": [NOW, NOW]}, "tools", "tools: expected a name for each tool, got 'now' twice"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools", "tools[0].type: expected a tool of type function"),
        ({"tools": ["now"]}, "tools", "tools[0]: expected a tool of type function, got a text"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function: expected an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools[0].function.name: expected"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools",
            "tools[0].function.parameters.type: expected 'object', got a text ('array')",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]},
            "tools",
            "tools[0].function.x: this field",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 300_000}}]},
            "tools",
            "tools: expected at most 262144 bytes of JSON, got 300",
        ),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice", "tool_choice: expected none, auto, required or"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "tool_choice: expected none, auto"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
            "tool_choice: expected the name of one of the tools (add), got a text ('sub')",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: expected null without tools"),
        ({"functions": [{"name": "add"}]}, "functions", "Send tools"),
        ({"function_call": "auto"}, "function_call", "Send tool_choice"),
        ({"separate_reasoning": True}, "separate_reasoning", "the chat template names no tags of reasoning"),
        ({"include_reasoning": False}, "include_reasoning", "Send separate_reasoning"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
            "messages",
            "messages[0].tool_calls: expected a list of calls of role assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 5}}]}]},
            "messages",
            "messages[0].tool_calls[0].function.arguments: expected JSON as a text, got a number",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "a"}}]},
            "messages",
            "messages[0].function_call: this field is not supported. Send tool_calls",
        ),
    ],
)
async def test_bad_fields_are_refused_by_name(
    make_parts: WritingGateway, fields: dict[str, Any], param: str, says: str
) -> None:
    error = await refusal(make_parts(), **fields)
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0].content }}{{ add_generation_prompt }}", "got one that does not read `tools`"),
        ("{{ tools }}{{ messages[0].content }}{{ add_generation_prompt }}", "a known format of calls (hermes, llama3_"),
    ],
)
async def test_a_template_without_calls_is_refused(make_parts: WritingGateway, template: str, says: str) -> None:
    parts = make_parts(template=template)
    for choice in ("auto", "required"):
        error = await refusal(parts, tools=[ADD], tool_choice=choice)
        assert error["param"] == "tools"
        assert says in error["message"]
    await whole(parts, tools=[ADD], tool_choice="none")


@pytest.mark.parametrize("by_adapter", [False, True])
async def test_a_setting_names_the_format(make_parts: WritingGateway, tmp_path: Path, *, by_adapter: bool) -> None:
    (tmp_path / "legal-v2").mkdir()
    template = "{{ tools }}{{ messages[0].content }}{{ add_generation_prompt }}"
    text = None if by_adapter else TextConfig(tool_format="mistral")
    parts = make_parts('[TOOL_CALLS][{"name": "now", "arguments": {}}]', template, text=text)
    parts.replica.tool_format = "mistral"
    choice = await whole(parts, tools=[NOW], model="legal-v2" if by_adapter else "base")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_call_is_enforced(make_parts: WritingGateway, choice: Any) -> None:
    parts = make_parts(CALL)
    found = await whole(parts, tools=[ADD, NOW], tool_choice=choice)
    assert found["finish_reason"] == "tool_calls"
    grammar = grammar_of(parts)
    assert grammar is not None
    spec = json.loads(grammar.text)
    assert spec["must_call"] is True
    assert list(spec["schemas"]) == (["add", "now"] if choice == "required" else ["add"])
    assert spec["schemas"]["add"] == SCHEMA
    assert (spec["form"]["between"] is None) == (choice == NAMED)


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "required": ["a"]}, {"properties": {}, "required": ["a"]}),
        (
            {"properties": {"a": {}}, "additionalProperties": True},
            {"properties": {"a": {}}, "additionalProperties": True},
        ),
        (
            {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}]}}, "$defs": {"A": {"items": {"properties": {}}}}},
            {
                "properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}]}},
                "$defs": {"A": {"items": {"properties": {}, "additionalProperties": False}}},
                "additionalProperties": False,
            },
        ),
        (
            {"properties": {}, "allOf": [{"properties": {"b": {}}}]},
            {"properties": {}, "allOf": [{"properties": {"b": {}}}]},
        ),
    ],
)
def test_arguments_have_no_other_names_than_the_schemas(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    assert closed_schema(schema) == closed


async def test_a_strict_tool_is_enforced_where_it_is_called(make_parts: WritingGateway) -> None:
    parts = make_parts(CALL)
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    await whole(parts, tools=[strict, NOW])
    grammar = grammar_of(parts)
    assert grammar is not None
    assert json.loads(grammar.text)["schemas"] == {"add": SCHEMA, "now": {"type": "object"}}


async def test_a_format_beside_tools_is_that_of_texts_without_calls(make_parts: WritingGateway) -> None:
    parts = make_parts(CALL)
    await whole(parts, tools=[ADD], regex="[0-9]+")
    grammar = grammar_of(parts)
    assert grammar is not None
    assert json.loads(grammar.text)["otherwise"] == {"kind": "regex", "text": "[0-9]+"}


async def test_a_schema_that_cannot_be_enforced_is_refused_with_its_path(make_parts: WritingGateway) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "sort", "parameters": bad}}
    parts = make_parts()
    error = await refusal(parts, tools=[NOW, tool], tool_choice="required")
    assert error["param"] == "tools"
    assert error["message"].startswith("tools: the parameters of sort: #/properties/a/uniqueItems: this keyword")
    await whole(parts, tools=[NOW, tool])


async def test_a_call_that_cannot_be_enforced_is_refused(
    make_parts: WritingGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ranklet.replicas.grammar.checker.is_installed", lambda: False)
    parts = make_parts()
    error = await refusal(parts, tools=[NOW], tool_choice="required")
    assert error["message"] == f"tools: {NOT_INSTALLED}"
    await whole(parts, tools=[NOW])
