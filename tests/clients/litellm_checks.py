"""litellm: whole and streamed answers, and its mapping of errors."""

import asyncio
import json
from typing import Any

import litellm
import pytest

BASE = "SmolLM2-135M-Instruct"
QUESTION = "Why was my card charged twice?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def chat(model: str = BASE, **fields: Any) -> Any:
    given = {"messages": MESSAGES, "max_tokens": 40, "temperature": 0, "num_retries": 0, **fields}
    return litellm.completion(model=f"openai/{model}", **given)


@pytest.mark.parametrize("model", [BASE, "french", "json", "pirate", "ticket"])
def test_a_stream_is_the_whole_answer(model: str) -> None:
    whole = chat(model)
    parts = list(chat(model, stream=True, stream_options={"include_usage": True}))
    built: Any = litellm.stream_chunk_builder(parts, messages=MESSAGES)
    assert len(parts) > 3
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.usage.completion_tokens == whole.usage.completion_tokens
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens
    if model == "json":
        assert isinstance(json.loads(whole.choices[0].message.content), dict)


def test_asynchronous_calls_run_at_once() -> None:
    async def ask(model: str) -> str:
        answer: Any = await litellm.acompletion(
            model=f"openai/{model}", messages=MESSAGES, max_tokens=40, temperature=0, stream=True
        )
        return "".join([part.choices[0].delta.content or "" async for part in answer])

    async def run() -> list[str]:
        return await asyncio.gather(*(ask(model) for model in models))

    models = ["french", "json", "pirate", "ticket"]
    assert asyncio.run(run()) == [chat(model).choices[0].message.content for model in models]


def test_completions_without_a_chat() -> None:
    sent: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    whole: Any = litellm.text_completion(model=f"text-completion-openai/{BASE}", **sent, logprobs=2)
    streamed: Any = litellm.text_completion(model=f"text-completion-openai/{BASE}", **sent, stream=True)
    assert "Paris" in whole.choices[0].text
    assert "".join(part.choices[0].text or "" for part in streamed) == whole.choices[0].text
    assert len(whole.choices[0].logprobs.token_logprobs) == 8


def test_several_choices_with_logprobs() -> None:
    answer = chat(n=3, temperature=1.0, seed=1, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_embeddings() -> None:
    answer: Any = litellm.embedding(model=f"openai/{BASE}", input=["one text", "another"], encoding_format="float")
    assert [len(entry["embedding"]) for entry in answer.data] == [576, 576]


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(litellm.exceptions.NotFoundError):
        chat("frensh")


def test_a_long_prompt_exceeds_the_context_window() -> None:
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        chat(messages=[{"role": "user", "content": "a word " * 4000}])


def test_a_value_out_of_range_is_a_bad_request() -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="top_p"):
        chat(top_p=2)


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def test_a_required_tool_is_called() -> None:
    answer = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["now"]
    chunks = list(chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True))
    built: Any = litellm.stream_chunk_builder(chunks)
    assert [call.function.arguments for call in built.choices[0].message.tool_calls] == [
        call.function.arguments for call in answer.choices[0].message.tool_calls
    ]


def test_refused_by_name() -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="ebnf: this field is not supported"):
        chat(ebnf='root ::= "a"')
