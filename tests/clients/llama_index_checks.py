"""llama-index: OpenAILike as a chat model and as a completion model, and a chat engine with a memory."""

import asyncio
from typing import Any

import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

BASE = "SmolLM2-135M-Instruct"
MODELS = [BASE, "french", "json", "pirate", "ticket"]
MESSAGES = [
    ChatMessage(role=MessageRole.SYSTEM, content="You are a helpful assistant."),
    ChatMessage(role=MessageRole.USER, content="What is the capital of Norway?"),
]


def llm(model: str = BASE, **settings: Any) -> OpenAILike:
    given = {"is_chat_model": True, "max_tokens": 40, "temperature": 0.0, "context_window": 2048, "max_retries": 0}
    return OpenAILike(model=model, **(given | settings))


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_whole_chat(model: str) -> None:
    whole = llm(model).chat(MESSAGES)
    parts = list(llm(model).stream_chat(MESSAGES))
    assert whole.message.role == MessageRole.ASSISTANT
    assert whole.message.content
    assert "".join(part.delta or "" for part in parts) == parts[-1].message.content == whole.message.content


def test_asynchronous_calls() -> None:
    async def run() -> None:
        whole = await llm("pirate").achat(MESSAGES)
        parts = [part async for part in await llm("pirate").astream_chat(MESSAGES)]
        assert parts[-1].message.content == whole.message.content

    asyncio.run(run())


def test_completions() -> None:
    model = llm(is_chat_model=False, max_tokens=8)
    whole = model.complete("The capital of France is")
    parts = list(model.stream_complete("The capital of France is"))
    assert "Paris" in whole.text
    assert parts[-1].text == whole.text


def test_asynchronous_completions() -> None:
    async def run() -> None:
        model = llm(is_chat_model=False, max_tokens=8)
        whole = await model.acomplete("The capital of France is")
        parts = [part async for part in await model.astream_complete("The capital of France is")]
        assert parts[-1].text == whole.text

    asyncio.run(run())


def test_logprobs() -> None:
    answer = llm(logprobs=True, top_logprobs=3, max_tokens=5).chat(MESSAGES)
    assert answer.logprobs is not None
    assert [len(each) for each in answer.logprobs] == [3] * 5


def test_stop_strings() -> None:
    whole = llm(is_chat_model=False).complete("Count: 1, 2, 3, 4,")
    stopped = llm(is_chat_model=False, additional_kwargs={"stop": [" 7"]}).complete("Count: 1, 2, 3, 4,")
    assert whole.text.startswith(stopped.text + " 7")


def test_a_chat_engine_remembers() -> None:
    memory = ChatMemoryBuffer(token_limit=1500, tokenizer_fn=str.split)
    engine = SimpleChatEngine.from_defaults(llm=llm(), memory=memory, system_prompt="Answer in one sentence.")
    first = engine.chat("My name is Ada.")
    streamed = engine.stream_chat("What is my name?")
    text = "".join(streamed.response_gen)
    assert str(first)
    assert text
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"] * 2
    assert engine.chat_history[-1].content == text


def test_errors_keep_their_kind() -> None:
    with pytest.raises(openai.NotFoundError):
        llm("frensh").chat(MESSAGES)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens"):
        llm().chat([ChatMessage(role=MessageRole.USER, content="a word " * 4000)])


class Add(BaseModel):
    """Adds two numbers."""

    a: int = Field(ge=0, le=1000)
    b: int = Field(ge=0, le=1000)


def test_functions_are_called() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    model = llm(is_function_calling_model=True, max_tokens=100)
    tools = [FunctionTool.from_defaults(add, fn_schema=Add)]
    answer = model.chat_with_tools(tools, user_msg="What is 1 + 2?", tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "add"
    assert set(call.tool_kwargs) == {"a", "b"}
    chosen = model.predict_and_call(tools, user_msg="What is 1 + 2?", tool_required=True)
    assert int(chosen.response) == sum(chosen.sources[0].raw_input["kwargs"].values())
    streamed = list(model.stream_chat_with_tools(tools, user_msg="What is 1 + 2?", tool_required=True))
    assert model.get_tool_calls_from_response(streamed[-1])[0].tool_kwargs == call.tool_kwargs


def test_structured_prediction_by_a_function() -> None:
    model = llm(is_function_calling_model=True, max_tokens=100)
    assert isinstance(model.structured_predict(Add, PromptTemplate("What is 1 + 2?"), {"tool_required": True}), Add)
