"""Server-sent events of streamed answers, in the formats of OpenAI's API.

Frames come as bytes, so that those that wait for the same client can be joined and sent at once.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import orjson

FinishReason = Literal["stop", "length", "tool_calls"]
DONE: Final = b"data: [DONE]\n\n"


def frame(content: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(content)


def error_frame(error: Mapping[str, Any]) -> bytes:
    """Return the event of an error after the first token.

    Args:
        error: message, type, param and code.
    """
    return frame({"error": error})


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def completion_choice(
    index: int, text: str, *, logprobs: Mapping[str, Any] | None = None, finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None, token_ids: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return a choice of /v1/completions, which chunks and whole answers write alike.

    Args:
        stop_reason: the stop string or the stop token id that ended the text; None for the model's own ends.
        token_ids: None if the request did not ask for them.
    """
    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
    return _with_extras(choice, stop_reason, token_ids)


def chat_choice(
    index: int, delta: Mapping[str, Any], *, logprobs: Mapping[str, Any] | None = None,
    finish_reason: FinishReason | None = None, stop_reason: str | int | None = None, token_ids: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return a choice of a chunk of /v1/chat/completions."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return _with_extras(choice, stop_reason, token_ids)


def role_choice(index: int) -> dict[str, Any]:
    """Return the first choice of a chat's stream, which precedes the first text."""
    return chat_choice(index, {"role": "assistant", "content": "", "refusal": None})


class StreamFrames:
    """Writes the chunks of one streamed answer.

    Args:
        kind: `object` of the chunks.
        id: of the answer.
        created: Unix time.
        fingerprint: of the base model and the adapter.
        reports_usage: whether the last chunk has the usage. The others then have `usage: null`, or their own.
    """

    def __init__(
        self, kind: Literal["text_completion", "chat.completion.chunk"], id: str, *, model: str, created: int,
        fingerprint: str, reports_usage: bool = False,
    ) -> None:  # fmt: skip
        self._head = {"id": id, "object": kind, "created": created, "model": model, "system_fingerprint": fingerprint}
        self._reports_usage = reports_usage

    def chunk(
        self, choice: Mapping[str, Any], usage: Mapping[str, Any] | None = None, extras: Mapping[str, Any] | None = None
    ) -> bytes:
        """Return the frame of a choice.

        Args:
            usage: the usage so far, if the client wants it with each chunk.
            extras: further fields.
        """
        content: dict[str, Any] = self._head | {"choices": [choice], **(extras or {})}
        if self._reports_usage:
            content["usage"] = usage
        return frame(content)

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """Return the last frame, which has no choices."""
        return frame(self._head | {"choices": [], "usage": usage})


def _with_extras(choice: dict[str, Any], stop_reason: str | int | None, token_ids: list[int] | None) -> dict[str, Any]:
    if choice["finish_reason"] is not None:
        choice["stop_reason"] = stop_reason
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return choice
