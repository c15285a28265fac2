"""Large bodies have fair shares of a gateway's room by key, or by the client's address where there are no keys."""

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from ranklet.cluster.access.keys import new_key
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.datapath import CLIENT_HEADER, FAST_PATH
from ranklet.cluster.ingress.sender import sender_of
from tests.cluster.ingress.parts import BASE, Parts
from tests.cluster.ingress.test_exchange import until

HAPROXY = next(iter(FAST_PATH))


def request(client: str | None, said: str | None = None) -> Request:
    headers = [] if said is None else [(CLIENT_HEADER.encode(), said.encode())]
    return Request({"type": "http", "headers": headers, "client": client and (client, 1)})


@pytest.mark.parametrize(
    ("client", "sender"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("a name", ""),
        (None, ""),
    ],
)
def test_a_sender_is_an_address_or_a_network_of_ipv6(
    client: str | None, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(HAPROXY, raising=False)
    assert sender_of(None, request(client)) == sender
    assert sender_of(None, request(client, "198.51.100.7")) == sender, "without HAProxy, a client may claim anything"


def test_haproxy_says_who_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HAPROXY, "1")
    assert sender_of(None, request("127.0.0.1", "198.51.100.7")) == "198.51.100.7"
    assert sender_of(None, request("127.0.0.1")) == "127.0.0.1"


def test_a_key_is_one_sender_at_any_address() -> None:
    _, key = new_key("team", admin=False, adapters=("*",), tokens_per_minute=None)
    assert {sender_of(key, request(client)) for client in ("192.0.2.1", "192.0.2.2")} == {"team"}


async def test_a_client_without_a_key_cannot_use_up_the_room_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HAPROXY, "1")
    parts = Parts(tmp_path, LimitsConfig(max_held_body_bytes=1_000_000))
    room = parts.services.intake.room

    async def post(address: str, size_bytes: int) -> httpx.Response:
        content = f'{{"model": "{BASE}", "input": "{"word " * 2000}"}}'.encode()
        return await parts.http.post(
            "/v1/embeddings", content=content.ljust(size_bytes), headers={CLIENT_HEADER: address}
        )

    parts.tokenizer.released.clear()
    first = asyncio.ensure_future(post("192.0.2.1", 700_000))
    await until(lambda: room.held.total() == 700_000)
    refused = await post("192.0.2.1", 150_000)
    assert refused.status_code == 503
    assert "for one key or client" in refused.json()["error"]["message"]
    second = asyncio.ensure_future(post("192.0.2.2", 150_000))
    await until(lambda: set(room.held) == {"192.0.2.1", "192.0.2.2"})
    parts.tokenizer.released.set()
    assert [answer.status_code for answer in await asyncio.gather(first, second)] == [200, 200]
    assert not room.held
