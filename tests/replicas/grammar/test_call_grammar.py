"""Grammars of calls and of reasoning before a text, with the tokens of bytes, of which some stand for tags."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ranklet.replicas.grammar.call_grammar import CallForm, Lead, Tag, calls_text
from ranklet.replicas.grammar.grammar import Grammar

llguidance = pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
SCHEMAS = {"f": SCHEMA, "g": {"type": "object"}}
OPENS, CLOSES = 5, 6  # tokens that stand for tags
HERMES = CallForm(
    before=(Tag("<tool_call>"), Tag("\n")), after=(Tag("}\n"), Tag("</tool_call>")), between="\n"
)  # fmt: skip
SINGLE = CallForm(before=HERMES.before, after=HERMES.after)
SPECIAL = CallForm(
    before=(Tag("<tool_call>", OPENS), Tag("\n")), after=(Tag("}\n"), Tag("</tool_call>", CLOSES)), between="\n"
)
MISTRAL = CallForm(first=(Tag("[TOOL_CALLS]", OPENS), Tag("[")), between=", ", last="]")
LLAMA = CallForm(arguments='", "parameters": ', is_tagged=False)
OF_F, OF_G = '{"name": "f", "arguments": {"a": 5}}', '{"name": "g", "arguments": {}}'
BARE = OF_F.replace("arguments", "parameters")
CALL = f"<tool_call>\n{OF_F}\n</tool_call>"
NUMBER = {"kind": "regex", "text": "[0-9]+"}
Text = str | Sequence[str | int]


def accepts(grammar: Grammar, text: Text) -> bool:
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar.definition(), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    parts = [text] if isinstance(text, str) else text
    tokens = [token for part in parts for token in ([part] if isinstance(part, int) else tokenizer.tokenize_str(part))]
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def calls(form: CallForm, *, must: bool = True, other: dict[str, str] | None = None) -> Grammar:
    return Grammar("calls", calls_text(form, SCHEMAS, must_call=must, otherwise=other))


@pytest.mark.parametrize(
    ("form", "text", "fits"),
    [
        (HERMES, CALL, True),
        (HERMES, f"{CALL}\n{CALL}", True),
        (SINGLE, f"{CALL}\n{CALL}", False),
        (HERMES, "I add.", False),
        (HERMES, "", False),
        (HERMES, CALL.replace("5", '"5"'), False),
        (HERMES, CALL.replace('"f"', '"h"'), False),
        (SPECIAL, [OPENS, f"\n{OF_F}\n", CLOSES, "\n", OPENS, f"\n{OF_G}\n", CLOSES], True),
        (SPECIAL, CALL, False),
        (MISTRAL, [OPENS, f"[{OF_F}]"], True),
        (MISTRAL, [OPENS, f"[{OF_F}, {OF_G}]"], True),
        (MISTRAL, [OPENS, f"[{OF_F}"], False),
        (LLAMA, BARE, True),
        (LLAMA, OF_F, False),
    ],
)
def test_a_call_cannot_fail(form: CallForm, text: Text, *, fits: bool) -> None:
    assert accepts(calls(form), text) is fits


@pytest.mark.parametrize(
    ("form", "text", "fits"),
    [
        (HERMES, "I add.", True),
        (HERMES, "", True),
        (HERMES, f"I add. {CALL} And <b>again</b> {CALL}.", True),
        (SINGLE, f"I add. {CALL} Done.", True),
        (HERMES, "I add. <tool_call>\n{}", False),
        (HERMES, CALL.replace("5", "{}"), False),
        (SPECIAL, ["I add.", OPENS, f"\n{OF_F}\n", CLOSES, "Done."], True),
        (MISTRAL, ["I add.", OPENS, f"[{OF_F}, {OF_G}]"], True),
        (MISTRAL, ["I add.", OPENS, OF_F], False),
        (LLAMA, "I add.", True),
        (LLAMA, "", True),
        (LLAMA, BARE, True),
        (LLAMA, BARE.replace("5", "true"), False),
    ],
)
def test_calls_within_free_text_follow_their_schemas(form: CallForm, text: Text, *, fits: bool) -> None:
    assert accepts(calls(form, must=False), text) is fits


@pytest.mark.parametrize(("text", "fits"), [(CALL, True), ("42", True), ("I add.", False), (f"4{CALL}", False)])
def test_a_text_without_calls_may_have_a_format(text: Text, *, fits: bool) -> None:
    assert accepts(calls(HERMES, must=False, other=NUMBER), text) is fits


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (calls(HERMES), CALL),
        (Grammar.of_schema(SCHEMA), '{"a": 1}'),
        (Grammar("regex", "a+"), "aa"),
        (Grammar("lark", 'start: "b" TEXT\nTEXT: /c+/'), "bcc"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_grammar_may_begin_behind_reasoning(grammar: Grammar, text: str) -> None:
    opened = Grammar(grammar.kind, grammar.text, Lead(None, Tag("</think>")))
    assert accepts(opened, f"Hm. </thin\n</think>\n\n{text}")
    assert not accepts(opened, text)
    free = Grammar(grammar.kind, grammar.text, Lead(Tag("<think>", OPENS), Tag("</think>", CLOSES)))
    assert accepts(free, [OPENS, "Hm.", CLOSES, f"\n\n{text}"])
    assert accepts(free, text)
    assert not accepts(free, [OPENS, "Hm."])
    assert not accepts(free, f"Hm.{text}")


def test_tags_are_texts_where_there_are_no_such_tokens() -> None:
    assert f"<[{OPENS}]>" in calls(SPECIAL).definition()
    assert json.loads(calls(SPECIAL).definition(plain=True)) == json.loads(calls(HERMES).definition())
