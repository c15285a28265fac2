"""Frames of streams, read by the official client's own parser and types."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import orjson
import pytest
from openai import APIError, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from ranklet.cluster.text.frames import (
    DONE,
    StreamFrames,
    chat_choice,
    completion_choice,
    error_frame,
    role_choice,
    usage_of,
)
from tests.http_server import http_server

USAGE = usage_of(5, 2, 4)


def frames_of(kind: Any, *, reports_usage: bool = False) -> StreamFrames:
    return StreamFrames(kind, "id-1", model="base", created=17, fingerprint="fp", reports_usage=reports_usage)


CHAT, CHAT_WITH_USAGE = (frames_of("chat.completion.chunk", reports_usage=usage) for usage in (False, True))
TEXT, TEXT_WITH_USAGE = (frames_of("text_completion", reports_usage=usage) for usage in (False, True))


def content_of(frame: bytes) -> dict[str, Any]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert b"\n" not in frame[:-2]
    found: dict[str, Any] = orjson.loads(frame[len(b"data: ") :])
    return found


@contextmanager
def client_of(body: bytes) -> Iterator[OpenAI]:
    """Serve one stream to the official client."""

    class StreamHandler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with (
        http_server(StreamHandler) as port,
        OpenAI(api_key="x", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(name="chat_body")
def _chat_body() -> bytes:
    logprobs = {"content": [{"token": "é", "logprob": -1.0, "bytes": [195, 169], "top_logprobs": []}], "refusal": None}
    return b"".join(
        [
            CHAT_WITH_USAGE.chunk(role_choice(0)),
            CHAT_WITH_USAGE.chunk(chat_choice(0, {"content": "é\n\ndata: x"}, logprobs=logprobs)),
            CHAT_WITH_USAGE.chunk(chat_choice(0, {}, finish_reason="stop", stop_reason="###")),
            CHAT_WITH_USAGE.usage(USAGE),
            DONE,
        ]
    )


def chat_chunks(client: OpenAI) -> Iterator[ChatCompletionChunk]:
    with client.chat.completions.create(model="base", messages=[], stream=True) as stream:
        yield from stream


def test_a_streamed_chat(chat_body: bytes) -> None:
    with client_of(chat_body) as client:
        first, second, third, last = chat_chunks(client)
    for chunk in (first, second, third, last):
        ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True), strict=True)
        assert (chunk.id, chunk.object, chunk.created, chunk.model) == ("id-1", "chat.completion.chunk", 17, "base")
        assert chunk.system_fingerprint == "fp"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert second.choices[0].delta.content == "é\n\ndata: x"
    assert second.choices[0].logprobs is not None
    assert second.choices[0].delta.role is None
    assert [chunk.choices[0].finish_reason for chunk in (first, second, third)] == [None, None, "stop"]
    assert third.choices[0].to_dict()["stop_reason"] == "###"
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (5, 2, 7)
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 4


def test_a_streamed_completion() -> None:
    body = b"".join(
        [
            TEXT_WITH_USAGE.chunk(completion_choice(0, "a", token_ids=[7])),
            TEXT_WITH_USAGE.chunk(completion_choice(1, "b", finish_reason="length")),
            TEXT_WITH_USAGE.usage(USAGE),
            DONE,
        ]
    )
    with client_of(body) as client, client.completions.create(model="base", prompt="", stream=True) as stream:
        first, second, last = stream
    for chunk in (first, second, last):
        assert (chunk.id, chunk.object, chunk.created, chunk.model) == ("id-1", "text_completion", 17, "base")
    Completion.model_validate(second.model_dump(exclude_unset=True), strict=True)
    assert (first.choices[0].text, first.choices[0].index, first.choices[0].to_dict()["token_ids"]) == ("a", 0, [7])
    assert (second.choices[0].index, second.choices[0].finish_reason) == (1, "length")
    assert (last.choices, last.usage and last.usage.total_tokens) == ([], 7)


@pytest.mark.parametrize(
    ("with_usage", "without", "choice"),
    [(CHAT_WITH_USAGE, CHAT, role_choice(0)), (TEXT_WITH_USAGE, TEXT, completion_choice(0, "a"))],
)
def test_other_chunks_have_no_usage(with_usage: StreamFrames, without: StreamFrames, choice: dict[str, Any]) -> None:
    assert content_of(with_usage.chunk(choice))["usage"] is None
    assert content_of(with_usage.chunk(choice, USAGE))["usage"] == USAGE
    assert "usage" not in content_of(without.chunk(choice))


def test_only_the_last_chunk_of_a_choice_has_a_stop_reason() -> None:
    assert "stop_reason" not in completion_choice(0, "a")
    assert completion_choice(0, "a", finish_reason="stop")["stop_reason"] is None
    assert completion_choice(0, "a", finish_reason="stop", stop_reason=13)["stop_reason"] == 13


def test_the_client_raises_an_error_event(chat_body: bytes) -> None:
    error = {"message": "the replica is gone", "type": "server_error", "param": None, "code": "unavailable"}
    whole = CHAT.chunk(role_choice(0)) + error_frame(error) + DONE
    assert content_of(error_frame(error)) == {"error": error}
    with client_of(whole) as client, pytest.raises(APIError, match="the replica is gone") as raised:
        list(chat_chunks(client))
    assert raised.value.code == "unavailable"


def test_done_is_a_frame() -> None:
    assert DONE == b"data: [DONE]\n\n"
