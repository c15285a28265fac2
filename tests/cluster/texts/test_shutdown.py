"""What clients get of their texts when operators remove the application, and when they shut Serve down."""

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from ranklet.cluster.command.ray_head import auth_environment, script_path
from tests.cluster.service import BASE, Service, eventually
from tests.cluster.stream_load import ReceivedStream, receive

SHORT, LONG = 300, 4000  # tokens; a long text takes half a minute or more
ENDS_S = 60.0


def test_texts_end_before_the_application_is_gone_and_a_shutdown_of_serve_breaks_them_off(
    service: Service, tmp_path: Path
) -> None:
    """No text that is broken off looks complete."""
    empty = tmp_path / "empty.yaml"
    empty.write_text(yaml.safe_dump({"applications": []}))
    try:
        short, long, whole = asyncio.run(_remove_and_shut_down(service, empty))
    finally:
        eventually("nothing is left", lambda: not service.cluster.applications())
        service.deploy(None)
        eventually("the service is back", service.cluster.is_ready)
    for stream in short:
        assert (stream.error, stream.usage["completion_tokens"]) == ("", SHORT)
        assert (len(stream.texts[0].tokens), stream.texts[0].reason) == (SHORT, "length")
    for stream in long:
        assert stream.error.startswith("ClientPayloadError"), stream.error
        assert 0 < len(stream.texts[0].tokens) < LONG
        assert (stream.texts[0].reason, stream.usage) == (None, {})
    assert isinstance(whole, aiohttp.ServerDisconnectedError)


async def _remove_and_shut_down(
    service: Service, empty: Path
) -> tuple[list[ReceivedStream], list[ReceivedStream], BaseException | int]:
    """Start texts, deploy a file without applications, and shut Serve down once the short ones have ended."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=ENDS_S)
    begun = asyncio.Queue[str]()

    def fields(tokens: int) -> dict[str, Any]:
        return {"model": BASE, "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}

    async def answer() -> int:
        async with http.post("/v1/completions", json=fields(LONG)) as whole:
            await whole.read()
            return whole.status

    async with aiohttp.ClientSession(service.url, timeout=timeout) as http, asyncio.timeout(4 * ENDS_S):
        whole = asyncio.create_task(answer())
        long, short = (
            [asyncio.create_task(receive(http, fields(tokens), begun.put_nowait)) for _ in range(2)]
            for tokens in (LONG, SHORT)
        )
        for _ in (*long, *short):
            await begun.get()
        await asyncio.to_thread(_serve, service, "deploy", str(empty))
        ended = await asyncio.gather(*short)
        early = [task.exception() or task.result() for task in (*long, whole) if task.done()]
        assert early == []
        await asyncio.to_thread(_serve, service, "shutdown", "--yes")
        (result,) = await asyncio.gather(whole, return_exceptions=True)
        return ended, await asyncio.gather(*long), result


def _serve(service: Service, *arguments: str) -> None:
    state = service.cluster.state
    subprocess.run(
        [script_path("serve"), *arguments, "--address", state.dashboard],
        env={**os.environ, **auth_environment(service.cluster.temp_dir)}, check=True,
    )  # fmt: skip
