"""Streams of several servers, cut anywhere: tokens, arrivals and outcome of each."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.command.bench.text_answer import TextStream, read_whole
from tests.cluster.command.bench.text_peer import DONE, chunk, frame, usage

ROLE = frame({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})


def read(*parts: bytes) -> TextStream:
    """Read each part one second after the part before it. The first arrives at 1 s."""
    stream = TextStream()
    for second, part in enumerate(parts, 1):
        stream.feed(part, float(second))
    stream.end(float(len(parts)))
    return stream


def test_only_text_is_an_arrival() -> None:
    end = [chunk("", chat=True, finish="stop"), frame({"choices": [], "usage": usage(9, 2, 4)}), DONE]
    stream = read(b": ping\n\n", ROLE, chunk("a", chat=True), b": ping\n\n", chunk("b", chat=True), *end)
    answer = stream.summary()
    assert (stream.outcome(), stream.done_s) == ("ok", 8.0)
    assert (answer.first_s, answer.last_s, list(stream.gaps_s)) == (3.0, 5.0, [2.0])
    assert (answer.output_tokens, answer.prompt_tokens, answer.cached_tokens) == (2, 9, 4)
    assert (answer.frames, answer.from_usage, answer.finish_reason) == (2, True, "stop")


def test_text_with_a_finish_reason_is_an_arrival() -> None:
    answer = read(chunk("a"), chunk("b", finish="length"), DONE).summary()
    assert (answer.frames, answer.output_tokens, answer.gaps, answer.finish_reason) == (2, 2, 1, "length")


def test_frames_of_one_read_are_one_arrival() -> None:
    stream = read(chunk("a") + chunk("b"), chunk("c") + chunk("d") + chunk("e"), DONE)
    answer = stream.summary()
    assert (answer.first_tokens, answer.gaps, answer.output_tokens, answer.from_usage) == (2, 1, 5, False)


def test_the_servers_count_wins_over_frames() -> None:
    answer = read(chunk("abc", usage=usage(1, 3)), chunk("de", usage=usage(1, 5)), DONE).summary()
    assert (answer.first_tokens, answer.output_tokens, answer.frames, answer.from_usage) == (3, 5, 2, True)


def test_text_that_looks_like_a_frame_is_text() -> None:
    texts = ["\ndata: [DONE]\n\n", '"error"', 'finish_reason":"stop"', '"usage":{"completion_tokens":9}', '""', "\n\n"]
    stream = read(*map(chunk, texts), DONE)
    answer = stream.summary()
    assert (stream.outcome(), answer.frames, answer.finish_reason, answer.from_usage) == ("ok", 6, None, False)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_text(field: str) -> None:
    answer = read(frame({"choices": [{"delta": {"content": None, field: "hm"}}]}), DONE).summary()
    assert (answer.frames, answer.first_s) == (1, 1.0)


def test_an_answer_without_text_is_good() -> None:
    stream = read(ROLE, chunk("", chat=True, finish="stop"), DONE)
    assert (stream.outcome(), stream.summary().first_s, stream.summary().output_tokens) == ("ok", None, 0)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"error": {"message": "no", "type": "t", "code": "engine_dead"}}, "engine_dead"),
        ({"error": {"message": "no", "type": "InternalServerError", "code": 500}}, "500"),  # vLLM
        ({"object": "error", "message": "no", "type": "Aborted", "code": None}, "Aborted"),  # SGLang
        ({"error": "overloaded", "error_type": "overloaded"}, "error_event"),  # TGI
    ],
)
@pytest.mark.parametrize("after_text", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_an_error_event_is_a_failure(event: Any, code: str, after_text: bool, done: bool) -> None:
    stream = read(*[chunk("a")] * after_text, frame(event), *[DONE] * done)
    assert (stream.outcome(), stream.summary().done_marker) == (code, done)


@pytest.mark.parametrize("content", [[1], {"choices": {"text": ""}}, {"choices": [5]}, 7])
def test_a_malformed_frame_before_the_first_text_is_a_failure(content: Any) -> None:
    assert read(frame(content), chunk("a"), DONE).outcome() == "bad_answer"


@pytest.mark.parametrize("end", [b"", chunk("", finish="stop"), b"data: [DON"])
def test_a_stream_without_done_is_a_failure(end: bytes) -> None:
    stream = read(chunk("a"), end)
    assert stream.outcome() in ("no_done", "bad_answer")
    assert not stream.summary().done_marker


def test_done_may_have_no_line_break() -> None:
    assert read(chunk("a"), b"data: [DONE]").outcome() == "ok"


@pytest.mark.parametrize("counts", [5, "many", [], {"completion_tokens": "two"}, {"prompt_tokens_details": 3}])
def test_odd_usage_does_not_stop_the_client(counts: Any) -> None:
    stream = read(chunk("a"), frame({"choices": [], "usage": counts}), DONE)
    assert stream.summary().prompt_tokens == 0


@given(
    texts=st.lists(st.text(max_size=5), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 2000), max_size=20),
    chat=st.booleans(), spaced=st.booleans(), line_break=st.sampled_from([b"\n", b"\r\n"]),
)  # fmt: skip
def test_cuts_change_no_count(texts: list[str], cuts: list[int], chat: bool, spaced: bool, line_break: bytes) -> None:
    frames = [chunk(text, chat=chat, spaced=spaced) for text in texts]
    end = [frame({"choices": [], "usage": usage(3, 50)}, spaced=spaced), b": ping\n\n", DONE]
    content = b"".join([ROLE, *frames, chunk("", chat=chat, finish="stop"), *end]).replace(b"\n", line_break)
    ends = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    stream = read(*(content[a:b] for a, b in itertools.pairwise(ends)))
    answer = stream.summary()
    assert stream.outcome() == "ok"
    assert answer.frames == sum(map(bool, texts))
    assert (answer.prompt_tokens, answer.output_tokens, answer.finish_reason) == (3, 50, "stop")
    assert answer.gaps == len(stream.gaps_s) < max(1, answer.frames)


def whole(choice: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"choices": [{"finish_reason": "stop", **choice}], "usage": usage(3, 4, 1), **fields}).encode()


@pytest.mark.parametrize("choice", [{"text": "a"}, {"message": {"content": "a"}}, {"message": {"content": None}}])
def test_whole_answers(choice: dict[str, Any]) -> None:
    outcome, answer = read_whole(whole(choice))
    assert outcome == "ok"
    assert answer is not None
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens, answer.finish_reason) == (3, 4, 1, "stop")
    assert (answer.first_s, answer.gaps, answer.done_marker) == (None, 0, True)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"<html>", whole({"text": 5}), whole({}), whole({"text": "a"}, usage=5)]
)
def test_a_malformed_whole_answer_is_bad(raw: bytes) -> None:
    assert read_whole(raw) == ("bad_answer", None)
