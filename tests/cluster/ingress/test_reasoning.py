"""Reasoning of chats at a gateway: it is apart from the content if that is wanted, and grammars begin behind it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.config import TextConfig
from ranklet.replicas.grammar.call_grammar import Lead, Tag
from tests.cluster.ingress.tool_parts import ADD, CALL, HERMES, WritingGateway, grammar_of, joined, streamed, whole

THINKING = HERMES + "{% if enable_thinking is false %}<think>\n\n</think>{% elif opens %}<think>\n{% endif %}"


@pytest.fixture
async def make_parts(tmp_path: Path) -> AsyncIterator[WritingGateway]:
    made = WritingGateway(tmp_path)
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("text", "arguments", "reasoning"),
    [
        ("<think>\nHm.\n</think>\n\nHello", {}, "Hm."),
        ("Hm.\n</think>\n\nHello", {"opens": True}, "Hm."),
        ("Hello", {"enable_thinking": False}, None),
    ],
)
async def test_reasoning_is_apart_from_the_content(
    make_parts: WritingGateway, text: str, arguments: dict[str, Any], reasoning: str | None
) -> None:
    parts = make_parts(text, THINKING)
    fields = {"separate_reasoning": True, "chat_template_kwargs": arguments}
    message = (await whole(parts, **fields))["message"]
    assert (message["content"], message["reasoning_content"]) == ("Hello", reasoning)
    found = joined(await streamed(parts, **fields))
    assert (found["content"], found["reasoning_content"]) == ("Hello", reasoning or "")
    unseparated = (await whole(parts, chat_template_kwargs=arguments))["message"]
    assert unseparated == {"role": "assistant", "content": text, "refusal": None}


async def test_a_setting_separates_reasoning(make_parts: WritingGateway) -> None:
    parts = make_parts(f"<think>{CALL}</think>{CALL}", THINKING, text=TextConfig(separate_reasoning=True))
    message = (await whole(parts, tools=[ADD]))["message"]
    assert (message["reasoning_content"], message["content"], len(message["tool_calls"])) == (CALL, None, 1)
    message = (await whole(parts, tools=[ADD], separate_reasoning=False))["message"]
    assert (message["content"], len(message["tool_calls"])) == (f"<think>{CALL}</think>", 1)


@pytest.mark.parametrize(
    ("fields", "lead"),
    [
        ({"tools": [ADD], "tool_choice": "required"}, Lead(Tag("<think>"), Tag("</think>"))),
        ({"regex": "a", "separate_reasoning": True}, Lead(Tag("<think>"), Tag("</think>"))),
        (
            {"regex": "a", "separate_reasoning": True, "chat_template_kwargs": {"opens": True}},
            Lead(None, Tag("</think>")),
        ),
        ({"regex": "a", "separate_reasoning": True, "chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"regex": "a"}, None),
    ],
)
async def test_a_grammar_begins_behind_the_reasoning(
    make_parts: WritingGateway, fields: dict[str, Any], lead: Lead | None
) -> None:
    parts = make_parts("a", THINKING)
    await whole(parts, **fields)
    grammar = grammar_of(parts)
    assert grammar is not None
    assert grammar.lead == lead
