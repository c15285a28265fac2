"""The feeds of a replica: one stream a gateway, whose messages wait while it is closed, up to a limit."""

import asyncio
import pickle
import threading

import pytest

from ranklet.cluster.message import Begun
from ranklet.cluster.replica.feeds import OutgoingFeeds

WAIT_S = 60.0


async def next_of(stream: object) -> list[bytes]:
    async with asyncio.timeout(WAIT_S):
        found: list[bytes] = await anext(stream)  # type: ignore[call-overload]
        return found


async def test_messages_wait_for_the_stream_while_a_call_is_open_and_come_at_once() -> None:
    feeds = OutgoingFeeds()
    feeds.pieces("g", b"lost: no call is open")
    async with feeds.call_from("g"), feeds.call_from("other"):
        feeds.begin("g", Begun(3, "r", None, None, "b"))
        feeds.pieces("g", b"1")
        stream = feeds.read("g")
        assert await next_of(stream) == []
        begun, first = await next_of(stream)
        assert (pickle.loads(begun), first) == (Begun(3, "r", None, None, "b"), b"1")
        thread = threading.Timer(0.05, feeds.pieces, ("g", b"2"))
        thread.start()
        assert await next_of(stream) == [b"2"]
        await stream.aclose()
        feeds.pieces("g", b"3")
        again = feeds.read("g")
        assert [await next_of(again), await next_of(again)] == [[], [b"3"]]
        await again.aclose()
    feeds.pieces("g", b"lost again")
    last = feeds.read("g")
    assert await next_of(last) == []
    feeds.pieces("g", b"4")
    assert await next_of(last) == [b"4"]
    await last.aclose()


async def test_a_second_stream_of_a_gateway_ends_the_first() -> None:
    feeds = OutgoingFeeds()
    first, second, other = feeds.read("g"), feeds.read("g"), feeds.read("other")
    for stream in (first, second, other):
        assert await next_of(stream) == []
    waiting = asyncio.ensure_future(next_of(first))
    feeds.pieces("g", b"1")
    with pytest.raises(StopAsyncIteration):
        await waiting
    assert await next_of(second) == [b"1"]
    feeds.pieces("other", b"2")
    assert await next_of(other) == [b"2"]
    await second.aclose()
    await other.aclose()


async def test_a_stream_that_is_read_too_slowly_ends_and_begins_again_without_the_lost_messages() -> None:
    feeds = OutgoingFeeds(max_waiting_bytes=100)
    async with feeds.call_from("g"):
        stream = feeds.read("g")
        assert await next_of(stream) == []
        for _ in range(3):
            feeds.pieces("g", bytes(40))
        assert feeds.dropped_bytes == 120
        with pytest.raises(StopAsyncIteration):
            await next_of(stream)
        feeds.pieces("g", b"1")
        again = feeds.read("g")
        assert [await next_of(again), await next_of(again)] == [[], [b"1"]]
        await again.aclose()


async def test_a_message_of_a_stream_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranklet.cluster.replica.feeds.MAX_MESSAGE_BYTES", 5)
    feeds = OutgoingFeeds()
    stream = feeds.read("g")
    assert await next_of(stream) == []
    for number in range(5):
        feeds.pieces("g", bytes([number]) * 3)
    sizes = [len(b"".join(await next_of(stream))) for _ in range(3)]
    assert sizes == [6, 6, 3]
    await stream.aclose()
