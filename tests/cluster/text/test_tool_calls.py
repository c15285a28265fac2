"""Calls within texts: how a text is cut changes nothing, and what is no call stays text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.cluster.text.json_value import JsonValue
from ranklet.cluster.text.tool_calls import CallPiece, ToolCalls
from ranklet.cluster.text.tool_format import FORMATS, format_of, shows_tools
from tests.cluster.text import templates

NAMES = {"add", "get_time"}
ADD = '{"a": 1, "b": [2, {"c": "}\\""}]}'
ONE = f'{{"name": "add", "arguments": {ADD}}}'
LLAMA = ONE.replace("arguments", "parameters")
Split = tuple[str, list[tuple[str, str]], bool]


def split(form: str, pieces: list[str], most: int | None = None) -> Split:
    """Return the content, the calls, and whether these are complete."""
    calls = ToolCalls(FORMATS[form], NAMES, most)
    content, made = "", list[tuple[str, str]]()
    for found in [*(calls.push(piece) for piece in pieces), calls.finish()]:
        for each in found:
            if isinstance(each, str):
                content += each
                continue
            assert each.call == len(made) - (each.name is None), "the pieces of a call follow its name"
            if each.name is not None:
                made.append((each.name, ""))
            made[-1] = (made[-1][0], made[-1][1] + each.arguments)
    return content, made, calls.are_complete


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", "Hello", "Hello", []),
        ("hermes", " \n", " \n", []),
        ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("add", ADD)]),
        ("hermes", f"\n\n<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>\n", "", [("add", ADD)] * 2),
        ("hermes", f"I add.\n<tool_call>\n{ONE}\n</tool_call>Done <b", "I add.\nDone <b", [("add", ADD)]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "", [("add", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a"', "", [("add", '{"a"')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a"}} x', "}} x", [("add", '{"a"')]),
        ("hermes", f"<tool_call>{ONE}\n</tool_c", "", [("add", ADD)]),
        ("hermes", f"<tool_call>{ONE[:-1]}", "", [("add", ADD)]),
        ("mistral", f"[TOOL_CALLS][{ONE}]", "", [("add", ADD)]),
        ("mistral", f'Yes. [TOOL_CALLS] [{ONE}, {ONE[:-1]}, "id": "abcdefghi"}}] no', "Yes.  no", [("add", ADD)] * 2),
        ("mistral", f'[TOOL_CALLS][{ONE}, {{"name": "x"', ', {"name": "x"', [("add", ADD)]),
        ("llama3_json", LLAMA, "", [("add", ADD)]),
        ("llama3_json", f" {LLAMA}; {LLAMA}", "", [("add", ADD)] * 2),
        ("llama3_json", f"I call <|python_tag|>{LLAMA}", "I call ", [("add", ADD)]),
        ("llama3_json", f'{{"type": "function", {LLAMA[1:]}', "", [("add", ADD)]),
        ("llama3_json", f'{{"type": "function", "function": {ONE}}}', "", [("add", ADD)]),
        ("llama3_json", f"Use {LLAMA}", f"Use {LLAMA}", []),
    ],
)
def test_calls_and_text(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = split(form, [text])
    assert found[:2] == (content, calls)
    assert found == split(form, list(text))
    assert found[2] is (calls == [] or calls[-1][1] != '{"a"')


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call> no JSON </tool_call>",
        "<tool_call><tool_call>",
        f"<tool_call>{ONE.replace('add', 'unknown')}</tool_call>",
        '<tool_call>{"name": "add"',
        '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
        '<tool_call>{"city": "Oslo"}</tool_call>',
        '<tool_call>{"name": "add",, "arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        f"{' ' * 100}text {{",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert split("hermes", [text]) == split("hermes", list(text)) == (text, [], True)


def test_further_calls_than_wanted_stay_text() -> None:
    call = f"<tool_call>{ONE}</tool_call>"
    assert split("hermes", [f"{call}\n{call}"], most=1) == (f"\n{call}", [("add", ADD)], True)
    assert split("mistral", [f"[TOOL_CALLS][{ONE}, {ONE}]"], most=1) == (f", {ONE}]", [("add", ADD)], True)


def test_a_call_leaves_before_it_is_complete() -> None:
    calls = ToolCalls(FORMATS["hermes"], NAMES)
    assert calls.push('<tool_call>{"name": "add", "arguments": {"a": "lon') == [
        CallPiece(0, "add", ""),
        CallPiece(0, None, '{"a": "lon'),
    ]
    assert calls.push("g") == [CallPiece(0, None, "g")]


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", ONE, LLAMA, f"[{ONE}", "]", ", ", "; ", "\n",
        " ", "{", "}", '"', '{"name": "add", ', '"arguments": {', '{"name": "', "get_time", '{"name": "get_time"}',
        "text", "<tool", "[T", '{"a": [1', ONE[:40], ONE[40:], f"<tool_call>\n{ONE}\n</tool_call>", " " * 63, "\x01",
        '"id": 1}', '{"arguments": {}, "name": "add"}',
    ]
)  # fmt: skip


@given(st.data(), st.sampled_from(sorted(FORMATS)), st.lists(FRAGMENTS, max_size=12), st.sampled_from([None, 1]))
def test_how_a_text_is_cut_changes_nothing(data: Any, form: str, fragments: list[str], most: int | None) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split(form, [text], most)
    assert split(form, pieces, most) == split(form, list(text), most) == whole
    content, calls, _ = whole
    letters = iter(text)
    assert all(letter in letters for letter in content), "content keeps its order"
    assert calls or content == text
    for _, arguments in calls:
        value = JsonValue()
        assert value.push(arguments) == len(arguments), "arguments are the beginning of an object"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(st.lists(JSON, max_size=3) | st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.booleans())
def test_json_is_read_to_its_end(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    found = JsonValue()
    assert sum(found.push(letter) for letter in f"{text}]") == len(text)
    assert found.is_complete
    assert not found.is_broken


@given(st.sampled_from(["{", "[", '{"a":', '["', "[0", "[-"]), st.text('{}[]",:\\u01eE+-. \ntrufalsn\x01', max_size=12))
def test_only_json_is_complete(beginning: str, rest: str) -> None:
    text = (beginning + rest).rstrip()
    found = JsonValue()
    length = found.push(text)
    try:
        json.loads(text)
        is_json = True
    except ValueError:
        is_json = False
    assert (found.is_complete and length == len(text)) == is_json


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools | tojson }}<tool_call>", "hermes"),
        ("{{ tools }}[TOOL_CALLS] [", "mistral"),
        ("{{ tools }}<|python_tag|>{'parameters': 1}", "llama3_json"),
        ("{{ tools }}<tool_call><function=", None),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", None),
        ("{{ tools }}", None),
        ("<tool_call>", None),
        (templates.CHATML, None),
    ],
)
def test_a_template_tells_the_form_of_its_calls(template: str, form: str | None) -> None:
    assert format_of(template) == (None if form is None else FORMATS[form])
    assert shows_tools(template) == ("tools" in template)
