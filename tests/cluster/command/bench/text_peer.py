"""A small server with OpenAI's APIs for text, in a thread. The model's name decides what a stream consists of."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.cluster.command.bench.app_thread import serving

DONE = b"data: [DONE]\n\n"
FIRST_TEXT_S = 0.05  # before the first text, and after a role chunk
FAILURES = {
    "late-error": "engine_dead", "no-done": "no_done", "cut": "disconnected", "busy": "quota", "whole": "no_done",
    "broken": "bad_answer",
}  # fmt: skip
WELL = ("plain", "spaced", "crlf", "packed", "joined", "split", "uncounted", "counted-on")


def frame(content: Any, *, spaced: bool = False) -> bytes:
    return b"data: " + json.dumps(content, separators=None if spaced else (",", ":")).encode() + b"\n\n"


def chunk(text: str, *, chat: bool = False, spaced: bool = False, finish: str | None = None, **fields: Any) -> bytes:
    choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    content = {"choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": finish}], "usage": None, **fields}
    return frame(content, spaced=spaced)


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


@dataclass
class TextPeer:
    """The server, and the requests it received."""

    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)  # client ports
    in_flight: int = 0
    most_in_flight: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername")[1])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if body["model"] == "busy":
                return web.json_response({"error": {"message": "too much", "code": "quota"}}, status=429)
            if not body["stream"] or body["model"] == "whole":
                return self._whole(body)
            return await self._stream(request, body)
        finally:
            self.in_flight -= 1

    def _whole(self, body: dict[str, Any]) -> web.Response:
        choice = {"message": {"role": "assistant", "content": "a"}} if "messages" in body else {"text": "a"}
        counts = usage(3, body.get("max_tokens") or body["max_completion_tokens"], 1)
        return web.json_response({"choices": [{"index": 0, **choice, "finish_reason": "length"}], "usage": counts})

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        model, chat = body["model"], "messages" in body
        tokens = body.get("max_tokens") or body["max_completion_tokens"]
        await answer.write(b": ping\n\n")
        if chat:
            await answer.write(frame({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        await asyncio.sleep(FIRST_TEXT_S)
        for part in _parts(model, chat, tokens):
            if part is None:
                assert request.transport is not None
                request.transport.close()
                return answer
            await answer.write(part)
            await asyncio.sleep(0.002)
        return answer

    async def models(self, request: web.Request) -> web.Response:
        adapters = [{"id": name, "parent": "the-base"} for name in (*WELL, *FAILURES)]
        return web.json_response({"data": [{"id": "the-base", "parent": None}, *adapters]})


def _parts(model: str, chat: bool, tokens: int) -> Iterator[bytes | None]:
    """Yield what the server writes at once; None closes the connection."""
    spaced = model == "spaced"
    if model == "packed":
        frames = [chunk(" data: [DONE]" * 3, chat=chat) for _ in range(0, tokens, 3)]
    elif model == "counted-on":
        frames = [chunk(" a", chat=chat, usage=usage(3, 2 * i + 2)) for i in range(tokens // 2)]
    else:
        frames = [chunk(f' "{i}', chat=chat, spaced=spaced) for i in range(tokens)]
    end = [chunk("", chat=chat, spaced=spaced, finish="length")]
    if model != "uncounted":
        end.append(frame({"choices": [], "usage": usage(3, tokens, 2)}, spaced=spaced))
    if model == "joined":
        yield from (b"".join(frames[i : i + 4]) for i in range(0, tokens, 4))
    elif model == "split":
        content = b"".join(frames)
        yield from (content[i : i + 50] for i in range(0, len(content), 50))
    elif model == "late-error":
        yield from frames[:2]
        end = [frame({"error": {"message": "the engine died", "type": "server_error", "code": "engine_dead"}})]
    elif model == "broken":
        yield from frames[:1]
        end = [b'data: {"error"\n\n']
    elif model == "crlf":
        yield from (part.replace(b"\n", b"\r\n") for part in frames)
    else:
        yield from frames
    if model == "cut":
        yield None
    yield b": keep-alive\n\n"
    yield from end
    if model != "no-done":
        yield DONE


@contextlib.contextmanager
def running() -> Iterator[TextPeer]:
    """Run a peer on a free loopback port."""
    peer, app = TextPeer(), web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/completions", peer.complete)
    app.router.add_post("/v1/chat/completions", peer.complete)
    app.router.add_get("/v1/models", peer.models)
    with serving(app) as peer.port:
        yield peer
