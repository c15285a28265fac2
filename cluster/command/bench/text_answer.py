"""Answers of OpenAI's APIs for text: streams of server-sent events, and whole answers.

A stream's frames are parsed until the first text, and later only if they may hold more than text: an error, a finish
reason, token counts or the end. Other frames are counted. This costs a fifth of parsing all of them.
"""

from array import array
from typing import Any, NamedTuple

import orjson

from ranklet.cluster.command.bench.answer import BAD_ANSWER, OK, error_code

NO_DONE = "no_done"  # the stream ended without `data: [DONE]`
_ERROR_EVENT = "error_event"  # without a code of its own
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")  # of a chat's delta


class TextAnswer(NamedTuple):
    """Tokens and arrivals of one answer. Times are in seconds of the machine's monotonic clock."""

    first_s: float | None  # arrival of the first text; None without text, and for whole answers
    last_s: float | None
    gaps: int  # between arrivals of text
    frames: int  # with text
    first_tokens: int  # in the first arrival
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    from_usage: bool  # whether the server counted the tokens; otherwise each frame with text counts as one
    finish_reason: str | None
    done_marker: bool  # whether the stream contained `data: [DONE]`; True for whole answers


class TextStream:
    """One streamed answer. Frames that arrive in one read are one arrival, with as many tokens as they have."""

    __slots__ = ("_done", "_error", "_finish_reason", "_first_tokens", "_frames", "_last_s", "_tail", "_usage",
                 "done_s", "first_s", "gaps_s")  # fmt: skip

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.done_s: float | None = None  # arrival of `data: [DONE]`
        self.gaps_s = array("f")
        self._last_s = 0.0
        self._frames = 0
        self._first_tokens = 0
        self._usage: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._error: str | None = None
        self._done = False
        self._tail = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Read a part of the stream, which may end anywhere."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if data[-1:] != b"\n":
            end = data.rfind(b"\n") + 1
            data, self._tail = data[:end], data[end:]
        if self.first_s is not None and not _may_hold_more(data):
            frames = data.count(b"\ndata:") + data.startswith(b"data:")
        else:
            frames = sum([self._read_line(line, now_s) for line in data.split(b"\n")])
        if not frames:
            return
        self._frames += frames
        if self.first_s is None:
            self.first_s = now_s
            self._first_tokens = _count(self._usage, "completion_tokens") or frames
        else:
            self.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s

    def end(self, now_s: float) -> None:
        """Read the last line if it has no line break."""
        if self._tail:
            self.feed(b"\n", now_s)

    def outcome(self) -> str:
        """Return `ok`, or an error code, of a stream that has ended."""
        return self._error or (OK if self._done else NO_DONE)

    def summary(self) -> TextAnswer:
        counted = "completion_tokens" in self._usage
        return TextAnswer(
            self.first_s, self._last_s if self.first_s is not None else None, len(self.gaps_s), self._frames,
            self._first_tokens, _count(self._usage, "completion_tokens") if counted else self._frames,
            _count(self._usage, "prompt_tokens"), _cached_tokens(self._usage), counted, self._finish_reason, self._done,
        )  # fmt: skip

    def _read_line(self, line: bytes, now_s: float) -> bool:
        """Return whether a line is a frame with text. Comments and blank lines are not."""
        if not line.startswith(b"data:"):
            return False
        content = line[5:].strip()
        if content == b"[DONE]":
            self._done, self.done_s = True, now_s
            return False
        try:
            return self._read_frame(orjson.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self._error = self._error or BAD_ANSWER
            return False

    def _read_frame(self, frame: dict[str, Any]) -> bool:
        if frame.get("error") or frame.get("object") == "error":
            self._error = self._error or error_code(_ERROR_EVENT, frame)
            return False
        self._usage = dict(frame.get("usage") or self._usage)
        choices = frame.get("choices")
        if not choices:
            return False
        choice = choices[0]
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        delta = choice.get("delta")
        return bool(choice.get("text")) if delta is None else any(map(delta.get, _TEXT_FIELDS))


def read_whole(raw: bytes) -> tuple[str, TextAnswer | None]:
    """Return `ok` and the numbers of an answer with status 200 that was not streamed, or an error code and None."""
    try:
        content = orjson.loads(raw)
        choice = content["choices"][0]
        if not isinstance(choice["message"]["content"] if "message" in choice else choice["text"], str | None):
            return BAD_ANSWER, None
        usage = dict(content.get("usage") or {})
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return BAD_ANSWER, None
    return OK, TextAnswer(
        None, None, 0, 0, 0, _count(usage, "completion_tokens"), _count(usage, "prompt_tokens"), _cached_tokens(usage),
        "completion_tokens" in usage, reason, True,
    )  # fmt: skip


def _may_hold_more(data: bytes) -> bool:
    """Return whether a frame in `data` may hold more than text, or no text.

    JSON escapes quotes inside of texts, so a text can contain none of these except `[DONE]`.
    """
    return (
        b'""' in data or b'"error"' in data or b'finish_reason":"' in data or b'finish_reason": "' in data
        or b'usage":{' in data or b'usage": {' in data or b"[DONE]" in data
    )  # fmt: skip


def _count(usage: dict[str, Any], name: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else 0


def _cached_tokens(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details")
    return _count(details, "cached_tokens") if isinstance(details, dict) else 0
