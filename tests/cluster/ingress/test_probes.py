"""The readiness of a deployment follows the health of its replicas' engines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.requests import Request

from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.message import GatewayDescription
from ranklet.replicas.errors import Unavailable
from tests.cluster.ingress.parts import Parts


async def no_gateways() -> list[GatewayDescription]:
    return []


async def three_requests() -> int:
    return 3


async def test_ready_says_why_an_engine_is_unhealthy(tmp_path: Path) -> None:
    parts, request = Parts(tmp_path), Request({"type": "http", "headers": []})
    stopping = tmp_path / "stopping"
    probes = ProbesApi(parts.services.replicas, no_gateways, Drain(stopping), three_requests)
    answer = await probes.ready(request)
    assert json.loads(bytes(answer.body)) == {"status": "ready", "replica": "r0"}
    parts.handle.description = replace(parts.handle.description, problem="page 3: cached without a hash")
    with pytest.raises(Unavailable, match="r0 reports: page 3: cached without a hash"):
        await probes.ready(request)
    stopping.touch()
    answer = await probes.ready(request)
    assert (answer.status_code, json.loads(bytes(answer.body))) == (503, {"status": "stopping", "in_flight": 3})
