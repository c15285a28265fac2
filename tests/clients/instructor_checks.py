"""instructor, and the parsing of openai's own client: answers as pydantic models, by a schema and by tools."""

from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

BASE = "SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "Name a town."}]
FIELDS: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 120, "temperature": 0}


class Town(BaseModel):
    """A town."""

    name: str = Field(max_length=30)
    people: int = Field(ge=0, le=99_999_999)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA])
def test_instructor_returns_a_model(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    assert isinstance(client.chat.completions.create(response_model=Town, max_retries=0, **FIELDS), Town)


def test_instructor_streams_parts_of_a_model() -> None:
    client = instructor.from_openai(openai.OpenAI(max_retries=0))
    parts = list(client.chat.completions.create_partial(response_model=Town, max_retries=0, **FIELDS))
    assert len(parts) > 2
    assert parts[-1].people is not None


def test_openai_parses_a_schema() -> None:
    answer = openai.OpenAI(max_retries=0).chat.completions.parse(response_format=Town, **FIELDS)
    assert isinstance(answer.choices[0].message.parsed, Town)


def test_openai_parses_the_arguments_of_a_tool() -> None:
    tools = [openai.pydantic_function_tool(Town)]
    given: dict[str, Any] = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, **FIELDS}
    answer: Any = openai.OpenAI(max_retries=0).chat.completions.parse(**given)
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Town)
    with openai.OpenAI(max_retries=0).chat.completions.stream(**given) as stream:
        streamed: Any = stream.get_final_completion()
    (again,) = streamed.choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    assert streamed.choices[0].finish_reason == "tool_calls"
