"""A gateway that drains gets no request that it loses. Texts that take longer than its drain end with an error."""

import asyncio
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import pytest

from tests.cluster import load
from tests.cluster.nodes import actor_process, paused
from tests.cluster.service import BASE, TIMEOUT_S, Service, eventually, serving, text_configuration
from tests.cluster.stream_load import ReceivedStream, receive
from tests.needs import require

LIMIT_S = 15.0
STREAMS = 8
IN_FLIGHT = "ranklet_requests_in_flight"
OVER = "the time for requests in flight is over"
# A minute or more of work with all its streams.
LONG = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 4000, "n": 2, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def service(runs_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    require("haproxy")
    folder = tmp_path_factory.mktemp("drains")
    content = text_configuration(folder)
    gateway, replica = content["applications"][0]["deployments"]
    gateway |= {"num_replicas": 2, "graceful_shutdown_timeout_s": LIMIT_S}
    replica["num_replicas"] = 1
    with serving(content, folder) as service:
        yield service


@pytest.fixture(autouse=True)
def two_gateways(service: Service) -> None:
    service.scale("Gateway", 2)
    load.wait_for_gateways(service, 2)


def test_a_gateway_accepts_connections_until_haproxy_passes_over_it(service: Service) -> None:
    """Also if Serve does not tell HAProxy that the gateway leaves: HAProxy notices by its health checks."""
    first, last, haproxy = (
        int(service.cluster.ray_environment[f"RAY_SERVE_{name}_PORT"])
        for name in ("DIRECT_INGRESS_MIN_HTTP", "DIRECT_INGRESS_MAX_HTTP", "HAPROXY_METRICS")
    )
    ports = [port for port in range(first, last + 1) if accepts(port)]
    assert len(ports) == 2
    with paused(actor_process(service, "HAProxyManager")):
        service.scale("Gateway", 1)
        eventually("the gateway closes its port", lambda: not all(map(accepts, ports)), poll_s=0.05)
        assert load.gateways_down(haproxy) == 1


def accepts(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_texts_of_a_gateway_that_is_removed_end_with_an_error_at_its_limit(service: Service) -> None:
    """Those of the other gateway go on."""
    asyncio.run(_remove_gateway(service))


async def _remove_gateway(service: Service) -> None:
    begun = asyncio.Queue[str]()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(service.url, timeout=timeout, connector=connector) as http:
        streams = [asyncio.create_task(receive(http, LONG, begun.put_nowait)) for _ in range(STREAMS)]
        whole = [asyncio.create_task(_answer(http)) for _ in range(STREAMS)]
        for _ in streams:
            await begun.get()
        before = await asyncio.to_thread(load.of_gateways, service, IN_FLIGHT)
        assert sum(before.values()) == 2 * STREAMS
        assert all(before.values())
        began_s = time.monotonic()
        await asyncio.to_thread(service.scale, "Gateway", 1)
        ended: set[asyncio.Task[Any]] = set()
        expected = 2 * STREAMS
        while len(ended) < expected:
            ended |= (await asyncio.wait({*streams, *whole} - ended, return_when=asyncio.FIRST_COMPLETED))[0]
            (kept,) = await asyncio.to_thread(service.processes, "Gateway")
            expected = sum(count for gateway, count in before.items() if gateway != kept)
        assert time.monotonic() - began_s > LIMIT_S / 2
        assert 0 < len(ended) == expected < 2 * STREAMS
        for stream in ended.intersection(streams):
            seen: ReceivedStream = stream.result()
            assert OVER in seen.error, seen.error
            assert seen.texts
            assert all(text.tokens and text.reason is None for text in seen.texts.values())
        for one in ended.intersection(whole):
            status, headers, content = one.result()
            assert (status, content["error"]["code"]) == (503, "unavailable")
            assert int(headers["retry-after"]) >= 1
            assert OVER in content["error"]["message"]
        assert load.of_gateways(service, IN_FLIGHT) == {kept: 2 * STREAMS - expected}
        for task in (*streams, *whole):
            task.cancel()


async def _answer(http: aiohttp.ClientSession) -> tuple[int, Mapping[str, str], Any]:
    async with http.post("/v1/completions", json=LONG) as answer:
        return answer.status, answer.headers, await answer.json()
