"""Text calls of gateways that have ended are cancelled, and no others."""

import asyncio
from collections.abc import Collection

import pytest

from ranklet.cluster.replica.feeds import GatewayLost, OutgoingFeeds
from ranklet.cluster.replica.lost_gateways import LostGateways

LONG_S = 1000.0


async def outcome(feeds: OutgoingFeeds, gateway: str) -> str:
    """Return how a long call of a gateway ends."""
    try:
        async with feeds.call_from(gateway):
            await asyncio.sleep(LONG_S)
    except GatewayLost:
        return "lost"
    except asyncio.CancelledError:
        return "cancelled"
    return "done"


async def test_calls_of_a_gateway_end_once_it_is_not_reached_and_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranklet.cluster.replica.lost_gateways._INTERVAL_S", 0.01)
    feeds, ended, asked = OutgoingFeeds(), set[str](), list[set[str]]()

    def find_ended(gateways: Collection[str]) -> Collection[str]:
        asked.append(set(gateways))
        if len(asked) == 1:
            raise ConnectionError("the GCS is down")
        return ended & set(gateways)

    lost = LostGateways(feeds, find_ended)
    looking = asyncio.ensure_future(lost.run())
    lost.on_reached(["a", "b"])
    calls = {name: asyncio.ensure_future(outcome(feeds, name)) for name in ("a", "b", "leaving")}
    second = asyncio.ensure_future(outcome(feeds, "b"))
    stream = feeds.read("b")
    assert await anext(stream) == []
    await asyncio.sleep(0.1)
    assert len(asked) > 2
    assert all(names == {"leaving"} for names in asked), "no question is asked about gateways that reports reach"
    ended.add("b")
    lost.on_reached(["a"])
    assert [await calls["b"], await second] == ["lost", "lost"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert feeds.callers == {"a", "leaving"}
    for name in ("a", "leaving"):
        calls[name].cancel()
        assert await calls[name] == "cancelled"
    assert feeds.callers == set()
    feeds.lose("a")
    looking.cancel()


async def test_a_call_that_times_out_by_itself_is_not_of_a_lost_gateway() -> None:
    with pytest.raises(TimeoutError, match="of its own"):
        async with OutgoingFeeds().call_from("g"):
            raise TimeoutError("of its own")
