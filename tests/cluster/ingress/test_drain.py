"""A drain: requests in flight end, streams included, and new ones are refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ranklet.cluster.ingress.drain import Drain, DrainMiddleware


class SlowApp:
    """Streams two words, the second one when `go_on` is set."""

    def __init__(self, drain: Drain) -> None:
        self.began, self.go_on = asyncio.Event(), asyncio.Event()
        routes = [Route("/slow", self.slow, methods=["POST"]), Route("/health", self.health)]
        self.app = Starlette(routes=routes, middleware=[Middleware(DrainMiddleware, drain=drain)])
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def slow(self, request: Request) -> Response:
        return StreamingResponse(self._words())

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _words(self) -> AsyncIterator[str]:
        yield "one "
        self.began.set()
        await self.go_on.wait()
        yield "two"


async def test_a_stream_in_flight_ends_and_a_new_request_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stopping"
    drain = Drain(file)
    slow = SlowApp(drain)
    first = asyncio.create_task(slow.http.post("/slow"))
    await slow.began.wait()
    assert (drain.is_on, drain.in_flight) == (False, 1)
    file.touch()
    refused = await slow.http.post("/slow")
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert int(refused.headers["retry-after"]) > 0
    assert "is stopping" in json.loads(refused.content)["error"]["message"]
    assert (await slow.http.get("/health")).status_code == 200, "probes are answered"
    assert drain.in_flight == 1
    slow.go_on.set()
    assert (await first).text == "one two"
    assert drain.in_flight == 0


async def test_a_client_that_leaves_is_not_waited_for(tmp_path: Path) -> None:
    drain = Drain(tmp_path / "stopping")
    slow = SlowApp(drain)
    request = asyncio.create_task(slow.http.post("/slow"))
    await slow.began.wait()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert drain.in_flight == 0
