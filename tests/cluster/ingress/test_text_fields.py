"""Fields of text requests: which are honoured, refused by name, accepted without effect, or ignored and named."""

from typing import Any
from unittest.mock import create_autospec

import numpy as np
import orjson
import pytest

from ranklet.cluster.ingress.chat_task import ChatTask
from ranklet.cluster.ingress.known_fields import CHAT_FIELDS, COMPLETION_FIELDS, ignored_value
from ranklet.cluster.ingress.messages import parse_messages
from ranklet.cluster.ingress.text_task import CompletionsTask, TextTask
from ranklet.cluster.ingress.texts import TextModels
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest

LIMITS = RequestLimits(1000, 64, 500, 1000)
TEXTS: TextModels = create_autospec(TextModels, instance=True)
COMPLETION = {"prompt": "a"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def task_of(fields: dict[str, Any], *, chat: bool) -> TextTask:
    body = orjson.dumps((CHAT if chat else COMPLETION) | fields)
    return ChatTask.parse(TEXTS, body) if chat else CompletionsTask.parse(TEXTS, body)


def params_of(fields: dict[str, Any], *, chat: bool = False) -> GenerateParams:
    return task_of(fields, chat=chat).check(LIMITS)[0]


def refusal(fields: dict[str, Any], *, chat: bool = False) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        task_of(fields, chat=chat).check(LIMITS)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, GenerateParams()),
        ({"max_tokens": None, "temperature": None, "stop": None, "n": None}, GenerateParams()),
        ({"max_tokens": 7, "n": 3, "best_of": 3}, GenerateParams(max_tokens=7, n=3)),
        ({"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.1}, GenerateParams(temperature=0, top_k=-1, min_p=0.1)),
        (
            {"presence_penalty": 1, "frequency_penalty": -0.5},
            GenerateParams(presence_penalty=1, frequency_penalty=-0.5),
        ),
        ({"repetition_penalty": 1.2, "seed": -1}, GenerateParams(repetition_penalty=1.2, seed=-1)),
        ({"logit_bias": {"5": -100}}, GenerateParams(logit_bias=((5, -100),))),
        ({"stop_token_ids": [3], "ignore_eos": True}, GenerateParams(stop_token_ids=(3,), ignore_eos=True)),
        ({"min_tokens": 2, "allowed_token_ids": [1, 2]}, GenerateParams(min_tokens=2, allowed_token_ids=(1, 2))),
        ({"logprobs": 20, "cache_salt": "a"}, GenerateParams(logprobs=20, cache_salt="a")),
        ({"prompt_logprobs": 2}, GenerateParams(prompt_logprobs=2)),
        ({"echo": True, "logprobs": 1}, GenerateParams(logprobs=1, prompt_logprobs=1)),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 4}, GenerateParams(logprobs=1, prompt_logprobs=4)),
        ({"echo": True, "max_tokens": 0}, GenerateParams(max_tokens=1)),
    ],
)
def test_fields_of_completions_are_honoured(fields: dict[str, Any], expected: GenerateParams) -> None:
    assert params_of(fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, GenerateParams(max_tokens=1000)),  # the rest of the context, once the prompt is known
        ({"max_tokens": 9}, GenerateParams(max_tokens=9)),
        ({"max_tokens": 9, "max_completion_tokens": 4}, GenerateParams(max_tokens=4)),
        ({"max_tokens": 9, "logprobs": True}, GenerateParams(max_tokens=9, logprobs=0)),
        ({"max_tokens": 9, "logprobs": True, "top_logprobs": 3}, GenerateParams(max_tokens=9, logprobs=3)),
        ({"max_tokens": 9, "logprobs": False}, GenerateParams(max_tokens=9)),
    ],
)
def test_fields_of_chats_are_honoured(fields: dict[str, Any], expected: GenerateParams) -> None:
    assert params_of(fields, chat=True) == expected


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": "5"}),
        ("max_tokens", {"max_tokens": 5.0}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("best_of", {"best_of": 2}),
        ("best_of", {"n": 2, "best_of": 3}),
        ("temperature", {"temperature": -0.1}),
        ("top_p", {"top_p": 0}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 1.5}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"500": 1}}),
        ("stop_token_ids", {"stop_token_ids": [500]}),
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("min_tokens", {"min_tokens": 17}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": ["a"] * 17}),
        ("stop", {"stop": 5}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("prompt_logprobs", {"stream": True, "prompt_logprobs": 1}),
        ("request_id", {"request_id": "x" * 129}),
        ("suffix", {"suffix": "end"}),
        ("max_completion_tokens", {"max_completion_tokens": 5}),
    ],
)
def test_bad_fields_of_completions_are_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    error = refusal(fields)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("logprobs", {"logprobs": 1}),
        ("top_logprobs", {"top_logprobs": 1}),
        ("top_logprobs", {"logprobs": False, "top_logprobs": 0}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("function_call", {"function_call": "auto"}),
        ("chat_template", {"chat_template": "{{ 1 }}"}),
        ("echo", {"echo": True}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("verbosity", {"verbosity": "low"}),
        ("documents", {"documents": "a"}),
    ],
)
def test_bad_fields_of_chats_are_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    assert refusal(fields, chat=True).param == param


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "neutral"),
    [
        ("use_beam_search", True, False),
        ("length_penalty", 0.5, 1.0),
        ("bad_words", ["a"], []),
        ("priority", 1, 0),
        ("guided_decoding_backend", "xgrammar", "auto"),
        ("guided_whitespace_pattern", " ", None),
        ("structural_tag", {"triggers": []}, {}),
        ("ebnf", 'root ::= "a"', ""),
        ("vllm_xargs", {"a": 1}, {}),
        ("store", True, False),
        ("service_tier", "priority", "auto"),
        ("spaces_between_special_tokens", False, True),
        ("stop_regex", "a+", None),
        ("max_new_tokens", 5, None),
        ("truncation", "auto", "disabled"),
        ("adapter_id", "legal", ""),
        ("extra_body", {"top_k": 1}, {}),
    ],
)
def test_a_field_that_changes_the_answer_is_refused_unless_neutral(
    name: str, bad: Any, neutral: Any, *, chat: bool
) -> None:
    error = refusal({name: bad}, chat=chat)
    assert error.param == name
    assert "not supported" in error.message
    for value in (neutral, None):
        assert task_of({name: value}, chat=chat).ignored == ()


@pytest.mark.parametrize(
    ("tokens", "side", "kept"),
    [
        (None, None, [*range(9)]),
        (3, None, [6, 7, 8]),
        (3, "left", [6, 7, 8]),
        (3, "right", [0, 1, 2]),
        (20, None, [*range(9)]),
        (-1, None, [*range(9)]),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_truncated_as_the_request_wants(
    tokens: int | None, side: str | None, kept: list[int], *, chat: bool
) -> None:
    """As in vLLM, the end of the prompt stays unless the request says otherwise."""
    fields = task_of({"truncate_prompt_tokens": tokens, "truncation_side": side}, chat=chat).fields
    rules = fields.prompt_rules(LIMITS, "prompt", 10, adds_special_tokens=True, is_limited=True)
    (prompt,) = rules.shorten([np.arange(9, dtype=np.int32)])
    assert prompt.tolist() == kept


def test_the_longest_prompt_leaves_room_for_the_text() -> None:
    prompt = np.zeros(1500, np.int32)
    for tokens, max_tokens, expected in ((-1, 10, 990), (990, 10, 990), (-1, 1000, 1500)):
        fields = task_of({"truncate_prompt_tokens": tokens}, chat=False).fields
        rules = fields.prompt_rules(LIMITS, "prompt", max_tokens, adds_special_tokens=True, is_limited=True)
        assert len(rules.shorten([prompt])[0]) == expected
    for tokens in (991, 0, -2):
        with pytest.raises(InvalidRequest, match=f"expected 1 to 990, or -1 .*, got {tokens}"):
            task_of({"truncate_prompt_tokens": tokens}, chat=True).fields.prompt_rules(
                LIMITS, "prompt", 10, adds_special_tokens=True, is_limited=True
            )


def test_a_boolean_is_no_neutral_number() -> None:
    assert refusal({"priority": False}).param == "priority"
    assert refusal({"use_beam_search": 0}).param == "use_beam_search"


@pytest.mark.parametrize("chat", [False, True])
def test_harmless_fields_are_accepted_and_unknown_ones_are_named(*, chat: bool) -> None:
    harmless = {"user": "a", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k", "rid": "r1"}
    assert task_of(harmless, chat=chat).ignored == ()
    assert task_of({"mystery": 1, "unset": None, "other": []}, chat=chat).ignored == ("mystery", "other")


def test_no_refused_field_is_honoured() -> None:
    for known, task in ((COMPLETION_FIELDS, False), (CHAT_FIELDS, True)):
        honoured = type(task_of({}, chat=task).fields).model_fields
        assert not set(known.refused) & set(honoured)
        assert not set(known.refused) & set(known.accepted)


def test_names_of_ignored_fields_are_safe_in_a_header() -> None:
    assert ignored_value(["a", "b-c.d_e"]) == "a,b-c.d_e"
    assert ignored_value(["bad\r\nname", "ü", "x" * 65, ""]) == "?,?,?,?"
    assert ignored_value([str(number) for number in range(30)]).endswith(",19,...")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages: expected a list"),
        ([], "messages: expected a list"),
        (["hi"], "messages[0]: expected an object"),
        ([{"content": "a"}], "messages[0].role: expected one of system"),
        ([{"role": "human", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content: expected a text"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages[0].content[0]: expected a part",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
    ],
)
def test_bad_messages_are_refused_with_their_place(messages: Any, where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(messages)
    assert caught.value.message.startswith(where)
    assert caught.value.param == "messages"


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts, "name": "x"}, {"role": "assistant", "content": None}]
    assert parse_messages(messages) == [
        {"role": "user", "content": "one\ntwo", "name": "x"}, {"role": "assistant", "content": None}
    ]  # fmt: skip
