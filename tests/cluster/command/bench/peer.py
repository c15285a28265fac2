"""A small server with OpenAI's embeddings API, in a thread. The model's name decides whether an answer is valid."""

import asyncio
import base64
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from tests.cluster.command.bench.app_thread import serving

GOOD, BAD = ("good-1", "good-2"), ("busy", "gone", "few", "hole", "plain")
ERRORS = {"busy": "quota", "gone": "ServerDisconnectedError", "few": "bad_answer", "plain": "500"}
BASE = "the-base"


@dataclass
class Peer:
    """The server, and the requests it received."""

    slow_s: float = 0.0
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    vocab: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def embed(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.add(request.headers.get("authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.slow_s)
        self.in_flight -= 1
        name = body.get("lora_path") or body["model"]
        content = body["input"]
        prompts = content if isinstance(content, list) and isinstance(content[0], (list, str)) else [content]
        if name == "busy":
            return web.json_response({"error": {"message": "too much", "code": "quota"}}, status=429)
        if name == "plain":
            return web.Response(text="oops", status=500)
        if name == "gone":
            assert request.transport is not None
            request.transport.close()
        vectors = [np.array([len(prompt), 1, np.nan if name == "hole" else 0], np.float32) for prompt in prompts]
        coded = body["encoding_format"] == "base64"
        data = [
            {"index": i, "embedding": base64.b64encode(v.tobytes()).decode() if coded else v.tolist()}
            for i, v in enumerate(vectors[name == "few" :])
        ]
        tokens = sum(map(len, prompts))
        return web.json_response({"data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    async def models(self, request: web.Request) -> web.Response:
        adapters = [{"id": name, "parent": BASE} for name in (*GOOD, *BAD)]
        size = {} if self.vocab is None else {"ranklet": {"vocab_size": self.vocab}}
        return web.json_response({"data": [{"id": BASE, "parent": None, **size}, *adapters]})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.2"})


@contextlib.contextmanager
def running(slow_s: float = 0.0) -> Iterator[Peer]:
    """Run a peer on a free loopback port."""
    peer, app = Peer(slow_s), web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/embeddings", peer.embed)
    app.router.add_get("/v1/models", peer.models)
    app.router.add_get("/version", peer.version)
    with serving(app) as peer.port:
        yield peer
