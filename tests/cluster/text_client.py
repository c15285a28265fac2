"""Reads streamed answers of text endpoints, and joins their chunks to whole answers."""

from typing import Any

import httpx
import orjson

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "The contract ends"
# Fields of requests whose streams must equal the whole answers. `top` stands for either endpoint's field.
STREAMED = [
    {},
    {"seed": 5, "n": 3},
    {"temperature": 0, "n": 2},
    {"seed": 6, "logprobs": True},
    {"seed": 7, "logprobs": True, "top": 3, "n": 2, "return_token_ids": True},
    {"seed": 8, "skip_special_tokens": False, "return_tokens_as_token_ids": True, "logprobs": True, "top": 0},
    {"seed": 9, "stop": ["e", "th", "a "], "n": 4, "logprobs": True},
    {"seed": 10, "stop": ["e", "o"], "include_stop_str_in_output": True, "return_token_ids": True},
    {"seed": 11, "stop": "s", "min_tokens": 20, "n": 2},
    {"seed": 12, "stop_token_ids": list(range(300, 700)), "n": 3, "logprobs": True},
    {"seed": 13, "stop_token_ids": list(range(300, 700)), "include_stop_str_in_output": True},
    {"model": "legal-v2", "seed": 14, "n": 2, "logprobs": True},
]
# Fields of completions only.
COMPLETED = [
    {"echo": True},
    {"echo": True, "logprobs": 1, "n": 2},
    {"echo": True, "logprobs": 2, "prompt": [[5, 6, 7], [8, 9, 10, 11]], "return_token_ids": True},
    {"echo": True, "max_tokens": 0},
    {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"echo": True, "stop": ["e", "o"], "n": 3},
    {"echo": True, "stop": ["e", "o"], "n": 3, "logprobs": 0},
    {"prompt": [PROMPT, "Another prompt", "A third"], "n": 2},
    {"prompt": list(range(3, 40)), "add_special_tokens": False, "skip_special_tokens": False},
    {"prompt": PROMPT, "add_special_tokens": False},
]


def events_of(body: bytes) -> list[Any]:
    """Return the events of a complete stream, without the last one, which must be [DONE]."""
    frames = body.decode().split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]", body[-500:]
    assert all(frame.startswith("data: ") for frame in frames)
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames]


def joined(events: list[Any]) -> dict[str, Any]:
    """Join the chunks of a stream to an answer in the form of a whole one."""
    head = {name: events[0][name] for name in ("id", "created", "model", "system_fingerprint")}
    answer: dict[str, Any] = {**head, "choices": []}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        assert {name: event[name] for name in head} == head
        if event.get("usage") is not None:
            answer["usage"] = event["usage"]
        if "prompt_token_ids" in event:
            answer["prompt_token_ids"] = event["prompt_token_ids"]
        for part in event["choices"]:
            _add(choices.setdefault(part["index"], {"index": part["index"]}), part)
    answer["choices"] = [choices[index] for index in sorted(choices)]
    return answer


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    assert choice.get("finish_reason") is None, "a chunk after the last one of its choice"
    if "delta" in part:
        message = choice.setdefault("message", {"content": ""})
        message["content"] += part["delta"].get("content", "")
        message |= {name: value for name, value in part["delta"].items() if name != "content"}
    else:
        choice["text"] = choice.get("text", "") + part["text"]
    for name in ("finish_reason", "stop_reason", "prompt_token_ids"):
        if name in part:
            choice[name] = part[name]
    if "token_ids" in part:
        choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    found = part["logprobs"]
    known: Any = choice.setdefault("logprobs", None)
    if found is not None and known is None:
        choice["logprobs"] = found
    elif found is not None:
        for name, values in found.items():
            if values is not None:
                known[name] = known[name] + values


class TextService:
    """Sends text requests to a service."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, path: str, fields: dict[str, Any]) -> httpx.Response:
        return self.http.post(path, json={"model": "demo-base", **fields})

    def whole(self, path: str, fields: dict[str, Any]) -> Any:
        answer = self.post(path, fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def streamed(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, {**fields, "stream": True, "stream_options": {"include_usage": True}})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return joined(events_of(answer.content))
