"""Texts over HTTP from one engine on the CPU: streams, logprobs, templates, errors, and the official openai client."""

import asyncio
import json
from typing import Any

import numpy as np
import openai
import pytest

from tests.assets.text_oracle import reference_logprobs, reference_text
from tests.cluster.service import BASE, Service, eventually
from tests.cluster.text_client import CHAT, COMPLETED, COMPLETIONS, PROMPT, STREAMED, TextService, events_of

MESSAGES = [{"role": "user", "content": "When does it end?"}]
OWN, FAILING = "medical", "support-rs"  # adapters with a chat template of their own; see `make_chat_models`


@pytest.fixture
def text(service: Service) -> TextService:
    return TextService(service.http)


def greedy(text: TextService, model: str, ids: list[int], tokens: int) -> list[int]:
    fields = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    made: list[int] = text.whole(COMPLETIONS, {**fields, "return_token_ids": True})["choices"][0]["token_ids"]
    return made


@pytest.mark.parametrize("adapter", [None, "legal-v2", OWN])
def test_texts_are_those_of_transformers_and_peft(service: Service, text: TextService, adapter: str | None) -> None:
    prompt = list(range(20, 45))
    folder = service.adapters / adapter if adapter else None
    (expected,) = reference_text(service.model_dir, folder, [prompt], 12, smallest_margin=0.0)
    assert greedy(text, adapter or BASE, prompt, 12) == expected.tokens.tolist()


@pytest.mark.parametrize("fields", STREAMED)
def test_a_stream_of_a_chat_is_the_whole_answer(text: TextService, fields: dict[str, Any]) -> None:
    sent = {"temperature": 1.3, "messages": MESSAGES, "max_tokens": 30, "seed": 3, **fields}
    if "top" in sent:
        sent["top_logprobs"] = sent.pop("top")
    assert_same(text.streamed(CHAT, sent), text.whole(CHAT, sent))


@pytest.mark.parametrize("fields", [*STREAMED, *COMPLETED])
def test_a_stream_of_a_completion_is_the_whole_answer(text: TextService, fields: dict[str, Any]) -> None:
    sent = {"temperature": 1.3, "prompt": PROMPT, "max_tokens": 30, "seed": 3, **fields}
    if sent.get("logprobs") is True:
        sent["logprobs"] = sent.get("top", 1)
    sent.pop("top", None)
    assert_same(text.streamed(COMPLETIONS, sent), text.whole(COMPLETIONS, sent))


def assert_same(streamed: dict[str, Any], whole: dict[str, Any]) -> None:
    for answer in (streamed, whole):
        answer.pop("id")
        answer.pop("created")
        answer["usage"].pop("prompt_tokens_details")  # the second request finds the prompt in the cache
        for choice in answer["choices"]:
            choice["logprobs"] = _rounded(choice["logprobs"])
    whole.pop("object")
    assert streamed == whole


def _rounded(value: Any) -> Any:
    """Round logprobs: a prompt that is read from the cache has other rounding errors."""
    if isinstance(value, float):
        return round(value, 2)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def test_the_usage_counts_tokens_up_to_the_end_of_each_text(text: TextService) -> None:
    fields = {"prompt": [PROMPT, PROMPT], "max_tokens": 9, "n": 2, "ignore_eos": True, "return_token_ids": True}
    whole = text.whole(COMPLETIONS, fields)
    prompts = sum(len(choice["prompt_token_ids"]) for choice in whole["choices"][::2])
    assert whole["usage"]["prompt_tokens"] == prompts
    assert whole["usage"]["completion_tokens"] == 36
    ids = greedy(text, BASE, [5, 6, 7], 20)
    ended = text.whole(
        COMPLETIONS,
        {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stop_token_ids": [ids[4]]},
    )
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["stop_reason"] == ids[4]
    assert ended["usage"]["completion_tokens"] == 1 + ids.index(ids[4])


def test_usage_may_come_with_every_chunk(text: TextService) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    sent = {"messages": MESSAGES, "max_tokens": 5, "stream": True, "stream_options": options, "ignore_eos": True}
    *chunks, last = events_of(text.post(CHAT, sent).content)
    made = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert made == sorted(made)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == made[-1] == 5
    plain = events_of(text.post(CHAT, {**sent, "stream_options": None}).content)
    assert all("usage" not in event for event in plain)


def test_the_request_of_lm_eval_gets_the_logprobs_of_transformers(service: Service, text: TextService) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 1000, length).tolist() for length in (5, 30, 70)]
    for model, folder in ((BASE, None), ("legal-v2", service.adapters / "legal-v2")):
        sent = {"model": model, "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        answer = text.whole(COMPLETIONS, {**sent, "seed": 1234})
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            found = choice["logprobs"]
            expected = reference_logprobs(service.model_dir, folder, prompt)
            assert found["token_logprobs"][0] is None
            own = expected[np.arange(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(found["token_logprobs"][1:-1], own, atol=1e-3)
            best = [max(top.values()) for top in found["top_logprobs"][1:-1]]
            np.testing.assert_allclose(best, expected[:-1].max(-1), atol=1e-3)
            assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt) + 1


def test_prompt_logprobs_are_shown_by_token_id(service: Service, text: TextService) -> None:
    prompt = [5, 60, 700, 8]
    sent = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 2}
    shown = text.whole(COMPLETIONS, sent)["choices"][0]["prompt_logprobs"]
    expected = reference_logprobs(service.model_dir, None, prompt)
    assert shown[0] is None
    for place, (token, each) in enumerate(zip(prompt[1:], shown[1:], strict=True)):
        assert each[str(token)]["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-3)
        assert each[str(int(expected[place].argmax()))]["rank"] == 1


def test_the_chat_template_of_the_base_or_of_the_adapter_makes_the_prompt(text: TextService) -> None:
    shown = {"return_token_ids": True}

    def prompt(model: str, **fields: Any) -> str:
        tokens = text.whole("/tokenize", {"model": model, "messages": MESSAGES, **fields})["tokens"]
        answer = text.whole(CHAT, {"model": model, "messages": MESSAGES, "max_tokens": 1, **fields, **shown})
        assert answer["prompt_token_ids"] == tokens
        made: str = text.whole("/detokenize", {"tokens": tokens})["prompt"]
        return made

    question = MESSAGES[0]["content"]
    assert prompt(BASE) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt("legal-v2") == prompt(BASE)
    assert prompt(OWN) == f"[user] {question}\n[assistant]"
    assert prompt(OWN, add_generation_prompt=False) == f"[user] {question}\n"
    failed = text.post(CHAT, {"model": FAILING, "messages": MESSAGES})
    assert failed.status_code == 400
    assert "only users may speak" in failed.json()["error"]["message"]
    cards = {model: text.http.get(f"/v1/models/{model}").json()["ranklet"] for model in (BASE, "legal-v2", OWN)}
    assert [card["chat_template"] for card in cards.values()] == ["base", "base", "adapter"]
    assert all(card["tasks"] == ["embeddings", "text"] and card["vocab_size"] > 0 for card in cards.values())


def test_a_replaced_adapter_answers_with_its_new_template(service: Service, text: TextService) -> None:
    folder = service.adapters / "finance-mlp"
    sent = {"model": "finance-mlp", "messages": MESSAGES, "max_tokens": 1, "return_token_ids": True}
    before = text.whole(CHAT, sent)
    (folder / "chat_template.jinja").write_text("{% if add_generation_prompt %}new{% endif %}")
    new = text.whole("/tokenize", {"prompt": "new", "add_special_tokens": False})["tokens"]
    eventually("the new template is used", lambda: bool(text.whole(CHAT, sent)["prompt_token_ids"] == new), poll_s=0.05)
    assert text.whole(CHAT, sent)["system_fingerprint"] != before["system_fingerprint"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "param"),
    [
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 4096}, 400, "context_length_exceeded", "prompt"),
        (COMPLETIONS, {"prompt": [3] * 5000}, 400, "context_length_exceeded", "prompt"),
        (COMPLETIONS, {"prompt": [2000]}, 400, "invalid_request_error", "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "invalid_request_error", "prompt"),
        (COMPLETIONS, {"prompt": PROMPT, "model": "legl-v2"}, 404, "model_not_found", "model"),
        (COMPLETIONS, {"prompt": PROMPT, "model": "legal-v2@0000"}, 404, "model_not_found", "model"),
        (COMPLETIONS, {"prompt": PROMPT, "temperature": -1}, 400, "invalid_request_error", "temperature"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 4096}, 400, "context_length_exceeded", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 100_000}]}, 400, "context_length_exceeded", "messages"),
        (CHAT, {"messages": MESSAGES, "reasoning_effort": "low"}, 400, "invalid_request_error", "reasoning_effort"),
    ],
)
def test_an_error_before_the_first_token_is_a_status(
    text: TextService, path: str, fields: dict[str, Any], status: int, code: str, param: str, *, stream: bool
) -> None:
    answer = text.post(path, {**fields, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    if code == "context_length_exceeded":
        assert "maximum context length is 4096 tokens" in error["message"]


def test_other_apis_name_those_for_text(text: TextService) -> None:
    for path in ("/v1/responses", "/v1/messages"):
        answer = text.post(path, {})
        assert answer.status_code == 404
        assert COMPLETIONS in answer.json()["error"]["message"]
        assert CHAT in answer.json()["error"]["message"]


def test_unknown_fields_are_named_in_a_header(text: TextService) -> None:
    sent = {"mystery": 1, "user": "me", "max_tokens": 1}
    for path, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": PROMPT})):
        for stream in (False, True):
            assert text.post(path, {**sent, **fields, "stream": stream}).headers["x-ranklet-ignored"] == "mystery"
    embedded = text.post("/v1/embeddings", {"input": "a", "mystery": 1, "user": "me"})
    assert embedded.status_code == 200
    assert embedded.headers["x-ranklet-ignored"] == "mystery"


@pytest.mark.parametrize("stream", [False, True])
def test_headers_say_where_the_text_was_made(text: TextService, *, stream: bool) -> None:
    answer = text.post(COMPLETIONS, {"model": "legal-v2", "prompt": PROMPT, "stream": stream})
    assert {"x-ranklet-replica", "x-ranklet-revision", "x-ranklet-tier"} <= answer.headers.keys()
    answers = [answer.json()] if not stream else events_of(answer.content)
    base, adapter = answers[0]["system_fingerprint"].removeprefix("fp_").split("_")
    assert answer.headers["x-ranklet-revision"].startswith(adapter)
    assert base


def test_the_openai_client_parses_all_answers(service: Service) -> None:
    client = service.openai()
    chat = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=6, seed=1, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [bytes(each.bytes or ()) for each in chat.choices[0].logprobs.content]
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    stream = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=6, seed=1, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == chat.choices[0].message.content
    done = client.completions.create(model="legal-v2", prompt=PROMPT, max_tokens=6, seed=1, logprobs=1, echo=True)
    parts = client.completions.create(model="legal-v2", prompt=PROMPT, max_tokens=6, seed=1, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    assert done.choices[0].text.startswith(PROMPT)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"


def test_a_required_tool_is_called_as_its_schema_says(service: Service) -> None:
    sizes = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"]}
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": sizes}} for name in ("cut", "sew")]
    given: dict[str, Any] = {"model": OWN, "messages": MESSAGES, "tools": tools, "tool_choice": "required", "seed": 1}
    given |= {"max_tokens": 250, "temperature": 1.0, "parallel_tool_calls": False}
    client = service.openai()
    answer: Any = client.chat.completions.create(**given)
    (whole,) = answer.choices
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert call.function.name in ("cut", "sew")
    assert json.loads(call.function.arguments) in ({"size": "small"}, {"size": "large"})
    with client.chat.completions.stream(**given) as stream:
        built: Any = stream.get_final_completion()
    (streamed,) = built.choices
    (again,) = streamed.message.tool_calls
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    assert streamed.finish_reason == "tool_calls"


def test_the_async_openai_client_reads_many_streams_at_once(service: Service) -> None:
    async def read(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=BASE, prompt=PROMPT, max_tokens=20, seed=seed, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([part.choices[0].text async for part in stream])

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
            together = await asyncio.gather(*(read(client, seed) for seed in range(12)))
            return together, [await read(client, seed) for seed in range(12)]

    together, alone = asyncio.run(run())
    assert together == alone
    assert len(set(together)) > 6
