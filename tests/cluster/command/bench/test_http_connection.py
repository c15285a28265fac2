"""The client against servers that frame, split and end their answers in every way HTTP allows."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ranklet.cluster.command.bench.text_client import TextLoadClient, TextReply
from tests.cluster.command.bench.text_peer import DONE, chunk

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
STREAM = chunk("a") + chunk("b") + DONE


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def sized(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


@contextlib.asynccontextmanager
async def serving(answer: bytes, *, step: int = 1 << 20, close: bool = False) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every request with the same bytes, `step` a write. Yields the URL and the requests' heads."""
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                heads.append(head)
                await reader.readexactly(2)
                for i in range(0, len(answer), step):
                    writer.write(answer[i : i + step])
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    return

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions?a=b", heads
        server.close()


async def ask(url: str, times: int = 1, *, streamed: bool = True, timeout_s: float = 30.0) -> list[TextReply]:
    client = TextLoadClient(url, {"authorization": "Bearer k"}, timeout_s, streamed=streamed)
    with contextlib.closing(client):
        return [await client.send(b"{}") for _ in range(times)]


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("answer", [CHUNKED + chunked(chunk("a"), chunk("b") + DONE), sized(STREAM)])
async def test_a_connection_carries_many_streams(answer: bytes, step: int) -> None:
    async with serving(answer, step=step) as (url, heads):
        replies = await ask(url, 3)
    assert [reply.outcome for reply in replies] == ["ok"] * 3
    assert [reply.answer.frames for reply in replies if reply.answer] == [2] * 3
    assert len(heads) == 3
    first_line, *lines = heads[0].decode().lower().split("\r\n")
    assert first_line == "post /v1/completions?a=b http/1.1"
    assert {"authorization: bearer k", "content-length: 2"} <= set(lines)


async def test_an_answer_may_end_with_its_connection() -> None:
    async with serving(HEAD + b"\r\n" + STREAM, close=True) as (url, heads):
        assert [reply.outcome for reply in await ask(url, 2)] == ["ok", "ok"]
    async with serving(HEAD + b"\r\n" + chunk("a"), close=True) as (url, heads):
        assert [reply.outcome for reply in await ask(url)] == ["no_done"]
    assert len(heads) == 1


async def test_connections_that_the_server_closes_are_replaced() -> None:
    answer = CHUNKED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + chunked(STREAM)
    async with serving(answer, close=True) as (url, _):
        assert [reply.outcome for reply in await ask(url, 3)] == ["ok"] * 3


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"", "disconnected"),
        (CHUNKED, "disconnected"),
        (CHUNKED + chunked(chunk("a"))[:-5], "disconnected"),
        (CHUNKED + chunked(STREAM)[:-5], "ok"),  # lost after [DONE]
        (CHUNKED + chunked(chunk("a")), "no_done"),
        (b"SSH-2.0-OpenSSH_9\r\n", "ConnectionError"),
        (sized(b'{"error": {"code": "quota"}}', b"429 Too Many Requests"), "quota"),
        (sized(b"upstream connect error", b"503 Service Unavailable"), "503"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" + sized(STREAM), "ok"),
    ],
)
async def test_the_outcome_of_every_end(answer: bytes, outcome: str) -> None:
    async with serving(answer, close=True) as (url, _):
        (reply,) = await ask(url)
    assert reply.outcome == outcome


async def test_a_stream_that_stalls_times_out() -> None:
    async with serving(CHUNKED + chunked(chunk("a"))[:-5]) as (url, _):
        (reply,) = await ask(url, timeout_s=0.2)
    assert reply.outcome == "TimeoutError"
    assert reply.answer is not None
    assert not reply.answer.done_marker


async def test_a_whole_answer() -> None:
    async with serving(sized(b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 7}}')) as (url, _):
        (reply,) = await ask(url, streamed=False)
    assert reply.outcome == "ok"
    assert reply.answer is not None
    assert reply.answer.output_tokens == 7


async def test_a_server_that_cannot_be_reached() -> None:
    (reply,) = await ask("http://127.0.0.1:9")
    assert reply.outcome == "ConnectionRefusedError"
