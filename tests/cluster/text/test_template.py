"""Prompts equal those of transformers' `apply_chat_template`."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ranklet.cluster.text.render_process import TrustedRenderer
from ranklet.cluster.text.template import ChatTemplate, folder_template
from ranklet.cluster.text.template_language import template_findings
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer_files import UnusableTokenError
from tests.cluster.text.small_tokenizers import make
from tests.cluster.text.templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, TEMPLATES, TOOLS

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=make("byte_level"), **SPECIAL)
USER = {"role": "user", "content": " What is 2 < 3? 你好 "}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is  "}
REASONED = {"role": "assistant", "content": "yes", "reasoning": "I think"}
CALL = {"function": {"name": "f", "arguments": {"x": "é"}}, "type": "function", "id": "1"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER],
    [USER, REASONED],
    [USER, REASONED, USER, ANSWER],
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, TrustedRenderer())


def reference(source: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    return str(TOKENIZER.apply_chat_template(messages, chat_template=source, tokenize=False, **settings))


def check(source: str, messages: list[dict[str, Any]], arguments: dict[str, Any] | None = None, **flags: Any) -> None:
    """Compare one prompt with that of transformers, or that both refuse the chat."""
    try:
        expected = reference(source, messages, **flags, **(arguments or {}))
    except Exception:
        with pytest.raises(InvalidRequest):
            template(source).prompt(messages, arguments=arguments, **flags)
    else:
        assert template(source).prompt(messages, arguments=arguments, **flags) == expected


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_those_of_transformers(name: str, chat: list[dict[str, Any]]) -> None:
    for add in (True, False):
        check(TEMPLATES[name], chat, add_generation_prompt=add)
    check(TEMPLATES[name], chat, add_generation_prompt=False, continue_final_message=True)


@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=4),
    st.sampled_from([(True, False), (False, False), (False, True)]),
)
def test_any_texts(name: str, texts: list[str], flags: tuple[bool, bool]) -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    check(TEMPLATES[name], chat, add_generation_prompt=flags[0], continue_final_message=flags[1])


@pytest.mark.parametrize("thinks", [True, False, None])
def test_arguments_reach_the_template(thinks: bool | None) -> None:
    arguments = {} if thinks is None else {"enable_thinking": thinks}
    check(QWEN3, [USER], arguments, add_generation_prompt=True)
    check(LLAMA3, [USER], {"date_string": "today", "bos_token": "<b>"}, add_generation_prompt=True)


def test_tools_reach_the_template() -> None:
    messages: list[dict[str, Any]] = [USER, CALLED, {"role": "tool", "content": "3", "tool_call_id": "1"}]
    check(TOOLS, messages, tools=[TOOL], add_generation_prompt=True)
    assert "f(x: string)" in template(TOOLS).prompt(messages, tools=[TOOL])


@pytest.mark.parametrize("content", ["go on ", [{"type": "text", "text": "go"}, {"type": "text", "text": "on "}]])
def test_a_continued_message_keeps_its_end(content: Any) -> None:
    source = "{% for m in messages %}{{ m.content if m.content is string else m.content|map(attribute='text')|join }}|"
    source += "{% endfor %}{{ add_generation_prompt }}"
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": content}]
    check(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert messages[1]["content"] == content


def test_fields_without_a_value_are_left_out() -> None:
    source = (
        "{% for m in messages %}{{ m.name is defined }}{{ m.content is none }}{% endfor %}{{ add_generation_prompt }}"
    )
    check(source, [{**USER, "name": None}, {"role": "assistant", "content": None}], add_generation_prompt=True)


def test_variables_of_a_generation_block_end_with_it() -> None:
    source = (
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ x }}{{ loop.index }}{{ m.content }}"
    )
    check(
        source + "{% endgeneration %}{{ x }}{% endfor %}{{ add_generation_prompt }}",
        [USER, ANSWER],
        add_generation_prompt=False,
    )


def test_the_models_own_template(smollm_dir: Path) -> None:
    source = folder_template(smollm_dir)
    assert source is not None
    own = AutoTokenizer.from_pretrained(smollm_dir, local_files_only=True)
    made = ChatTemplate(source, own.special_tokens_map, TrustedRenderer())
    for chat in CHATS:
        assert made.prompt(chat) == own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert template_findings(source) == ()


def test_the_templates_message_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="System role not supported") as raised:
        template(GEMMA).prompt([SYSTEM, USER])
    assert raised.value.param == "messages"
    with pytest.raises(InvalidRequest, match="must alternate"):
        template(MISTRAL).prompt([USER, USER])


@pytest.mark.parametrize(
    ("messages", "settings", "says"),
    [
        ([], {}, "at least one message"),
        ([USER], {"continue_final_message": True}, "add_generation_prompt"),
        ([CALLED], {"continue_final_message": True, "add_generation_prompt": False}, "a final message with text"),
        ([USER], {"arguments": {"tools": [], "messages": []}}, "messages, tools"),
        ([USER], {"arguments": {"add_generation_prompt": True}}, "add_generation_prompt"),
        ([USER], {"arguments": {"range": 3}}, "not callable|object"),
    ],
)
def test_bad_requests_are_refused(messages: list[dict[str, Any]], settings: dict[str, Any], says: str) -> None:
    source = "{% for i in range(2) %}{% endfor %}" + CHATML
    with pytest.raises(InvalidRequest, match=says):
        template(source).prompt(messages, **settings)


def test_a_template_that_drops_the_final_message_cannot_continue_it() -> None:
    with pytest.raises(InvalidRequest, match="keeps the final message unchanged"):
        template("{{ messages[0].role }}").prompt([USER], add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_findings(name: str) -> None:
    assert template_findings(TEMPLATES[name]) == ()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "add_generation_prompt"),
        ("{# add_generation_prompt #}{{ 'add_generation_prompt' }}", "add_generation_prompt"),
        ("{% if add_generation_prompt %}", "Jinja template"),
        ("{{ " + "(" * 20_000, "Jinja template"),
        ("{{ " + "1 + " * 20_000 + "1 }}", "Jinja template"),
        ("{{ " + "9" * 5000 + " }}", "Jinja template|add_generation_prompt"),
    ],
)
def test_findings(source: str, says: str) -> None:
    (finding,) = template_findings(source)
    assert says.split("|")[0] in finding or says.split("|")[-1] in finding


def test_findings_evaluate_nothing() -> None:
    assert len(template_findings("{{ 'x' * 10**12 }}")) == 1


def test_the_template_of_a_folder(tmp_path: Path) -> None:
    assert folder_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert folder_template(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "two"}, 3]
    config.write_text(json.dumps({"chat_template": named}))
    assert folder_template(tmp_path) == "two"
    config.write_text(json.dumps({"chat_template": {"default": "no"}}))
    assert folder_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("three\n")
    assert folder_template(tmp_path) == "three\n"


@pytest.mark.parametrize("content", [b"\xff", b"x" * ((1 << 16) + 1), b"x" * (5 << 20)])
def test_an_unusable_template_file_is_a_finding(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(UnusableTokenError, match="template"):
        folder_template(tmp_path)
