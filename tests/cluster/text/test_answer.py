"""Answers with reasoning, content and calls: how a text is cut changes nothing, and nothing of it is lost."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.text.answer import AnswerParts, SplitAnswer
from ranklet.cluster.text.reasoning import Stage, ThinkTags, tags_of
from ranklet.cluster.text.tool_format import FORMATS

TAGS = ThinkTags("<think>", "</think>")
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
Split = tuple[str, str, str]


def split(parts: AnswerParts, pieces: list[str]) -> Split:
    """Return the reasoning, the content and the arguments of the calls."""
    answer = SplitAnswer(parts)
    found = [*(answer.push(piece) for piece in pieces), answer.finish()]
    calls = "".join(f"{call.name or ''}{call.arguments}" for each in found for call in each.calls)
    return "".join(each.reasoning for each in found), "".join(each.content for each in found), calls


@pytest.mark.parametrize(
    ("stage", "text", "reasoning", "content"),
    [
        ("start", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("start", "\n <think>a</thin</think>b<think>c</think>", "a</thin", "b<think>c</think>"),
        ("start", "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        ("start", "<think>\n\n\n\nHm.\n\n\n</think>\n\n\nYes.", "\n\nHm.\n", "\nYes."),
        ("start", "<thi", "", "<thi"),
        ("start", " " * 100, "", " " * 100),
        ("reasoning", "Hm. <think>\n</think>", "Hm. <think>", ""),
        ("reasoning", "Hm.\n</thin", "Hm.\n</thin", ""),
        ("answer", "</think>Yes.", "", "</think>Yes."),
        ("start", "<think>\n\n</think>\n\n", "", ""),
    ],
)
def test_reasoning_and_content(stage: Stage, text: str, reasoning: str, content: str) -> None:
    parts = AnswerParts(TAGS, stage, separates=True)
    assert split(parts, [text]) == split(parts, list(text)) == (reasoning, content, "")


def test_calls_in_reasoning_are_none() -> None:
    text = f"<think>Shall I write {CALL}?</think>\n\n{CALL}"
    tools = AnswerParts(TAGS, tool_format=FORMATS["hermes"], names=frozenset({"f"}))
    assert split(tools, [text]) == ("", text.removesuffix(CALL), "f{}")
    separate = AnswerParts(TAGS, separates=True, tool_format=FORMATS["hermes"], names=frozenset({"f"}))
    assert split(separate, [text]) == (f"Shall I write {CALL}?", "", "f{}")


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "\n", " ", "text", "<thi", "nk>", "</th", "ink>", CALL, "<tool_call>"]
)


@given(st.data(), st.lists(FRAGMENTS, max_size=10), st.sampled_from(["start", "reasoning", "answer"]))
def test_how_a_text_is_cut_changes_nothing(data: Any, fragments: list[str], stage: Stage) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for tool_format in (None, FORMATS["hermes"]):
        for separates in (False, True):
            parts = AnswerParts(TAGS, stage, separates, tool_format, frozenset({"f"}))
            whole = split(parts, [text])
            assert split(parts, pieces) == split(parts, list(text)) == whole
            if not separates and tool_format is None:
                assert whole == ("", text, "")
    reasoning, content, _ = split(AnswerParts(TAGS, stage, separates=True), [text])
    dropped = text.replace(reasoning, "", 1) if reasoning else text
    assert dropped.endswith(content)
    assert set(dropped.removesuffix(content)) <= set("<think>/ \n")


@pytest.mark.parametrize(
    ("prompt", "stage"),
    [("<|assistant|>", "start"), ("<|assistant|><think>\n", "reasoning"), ("<think>\n\n</think>\n\n", "answer")],
)
def test_a_prompt_tells_where_its_answer_begins(prompt: str, stage: Stage) -> None:
    assert TAGS.stage_after(f"Say <think>.{prompt}") == stage


def test_a_template_tells_the_tags() -> None:
    assert tags_of("{{ content.split('</think>') }}") == TAGS
    assert tags_of("{{ '[THINK]' }}{{ '[/THINK]' }}") == ThinkTags("[THINK]", "[/THINK]")
    assert tags_of("{{ messages }}") is None
