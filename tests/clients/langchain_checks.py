"""LangChain: the standard tests of chat models, with ChatOpenAI on the base model and overridden with an adapter."""

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel, Field

BASE = "SmolLM2-135M-Instruct"
UNFIT = "a model with 135M parameters chooses no tool, and no keys that a prompt names"


class City(BaseModel):
    """A form that an answer may be asked to have."""

    name: str = Field(max_length=40)


class TestRanklet(ChatModelIntegrationTests):
    """The base model calls tools."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        single = {"parallel_tool_calls": False}  # so small a model would go on with calls
        settings = {"max_tokens": 60, "temperature": 0, "stream_usage": True, "max_retries": 0}
        return {"model": BASE, "model_kwargs": single, **settings}

    @property
    def model_override_value(self) -> str:
        return "pirate"

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return True

    @pytest.mark.xfail(reason=UNFIT)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason=UNFIT)
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)


class TestStructuredOutput(TestRanklet):
    """An adapter that was trained on JSON ends its texts, which the base model goes on with."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "model": "json"}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return False


def chat(model: str = BASE, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, **{"max_tokens": 32, "temperature": 0, "max_retries": 0, **settings})


@pytest.mark.parametrize("model", [BASE, "french", "json", "pirate", "ticket"])
def test_a_stream_is_the_whole_answer(model: str) -> None:
    whole = chat(model).invoke("Why was my card charged twice?")
    parts = list(chat(model, stream_usage=True).stream("Why was my card charged twice?"))
    summed = sum(parts[1:], parts[0])
    assert isinstance(summed, AIMessageChunk)
    assert summed.content == whole.content
    assert summed.usage_metadata is not None
    assert whole.usage_metadata is not None
    assert summed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert whole.response_metadata["model_name"] == model


def test_logprobs() -> None:
    answer = chat(logprobs=True, top_logprobs=2).invoke("Hello")
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer.response_metadata["logprobs"]["content"])


def test_completions() -> None:
    model = OpenAI(model=BASE, max_tokens=8, temperature=0, max_retries=0)
    whole = model.invoke("The capital of France is")
    assert "Paris" in whole
    assert "".join(model.stream("The capital of France is")) == whole
    assert model.batch(["The capital of France is", "The capital of France is"]) == [whole, whole]


def test_embeddings() -> None:
    # Without this option the client sends token ids of OpenAI's own tokenizer.
    vectors = OpenAIEmbeddings(model=BASE, check_embedding_ctx_length=False).embed_documents(["one", "another"])
    assert [len(vector) for vector in vectors] == [576, 576]


def test_structured_output_is_the_schemas() -> None:
    found = chat(max_tokens=120).with_structured_output(City, method="json_schema").invoke("Name a city.")
    assert isinstance(found, City)


@pytest.mark.parametrize("strict", [None, True])
def test_a_structured_output_by_a_tool_is_the_schemas(strict: bool | None) -> None:
    model = chat(max_tokens=120).with_structured_output(City, method="function_calling", strict=strict)
    assert isinstance(model.invoke("Name a city."), City)
    assert isinstance(list(model.stream("Name a city."))[-1], City)


def test_a_streamed_call_is_the_whole_ones() -> None:
    model = chat(max_tokens=120).bind_tools([City], tool_choice="any")
    whole = model.invoke("Name a city.")
    parts = list(model.stream("Name a city."))
    summed = sum(parts[1:], parts[0])
    assert isinstance(whole, AIMessage)
    assert isinstance(summed, AIMessageChunk)
    assert [call["args"] for call in summed.tool_calls] == [call["args"] for call in whole.tool_calls]
    assert whole.tool_calls[0]["name"] == "City"
    assert len([part for part in parts if part.tool_call_chunks]) > 2
