"""HTTP handlers for administrators: adapters by name, and the data of the status page."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.lifecycle import Lifecycle, LoadRequest, UnloadRequest
from ranklet.cluster.ingress.protocol import parse_body
from ranklet.cluster.ingress.refused_settings import refused_settings
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.status import status_of
from ranklet.cluster.message import GatewayDescription
from ranklet.replicas.errors import Unavailable
from ranklet.routing.affinity import Affinity

_MAX_BODY_BYTES = 1 << 16


@dataclass(frozen=True)
class AdminApi:
    """Handlers that require a key with admin rights, or `security.open_admin` where there are no keys.

    Attributes:
        base: name of the base model.
        recent_requests: collects `RecentRequests.as_dict` of all gateways.
        describe_gateways: returns the descriptions of all live gateways.
    """

    keys: ApiKeys
    limits: LimitsConfig
    base: str
    registry: Registry
    intake: Intake
    replicas: ReplicasClient
    affinity: Affinity
    lifecycle: Lifecycle
    cards: AdapterCards
    recent_requests: Callable[[], Awaitable[list[dict[str, Any]]]]
    describe_gateways: Callable[[], Awaitable[list[GatewayDescription]]]

    async def list_adapters(self, request: Request) -> Response:
        self.keys.require_admin(request.headers)
        cards, refused = await asyncio.gather(self.cards.cards(), self._refused_settings())
        return json_response({"object": "list", "data": cards, "refused_settings": refused})

    async def get_adapter(self, request: Request) -> Response:
        self.keys.require_admin(request.headers)
        return json_response(await self.cards.card(request.path_params["name"]))

    async def load_adapter(self, request: Request) -> Response:
        """Load or replace an adapter; see `LoadRequest`."""
        self.keys.require_admin(request.headers)
        return json_response(await self.lifecycle.load(parse_body(await self._body(request), LoadRequest)))

    async def unload_adapter(self, request: Request) -> Response:
        self.keys.require_admin(request.headers)
        name = parse_body(await self._body(request), UnloadRequest).name
        return json_response(await self.lifecycle.unload(name))

    async def delete_adapter(self, request: Request) -> Response:
        self.keys.require_admin(request.headers)
        return json_response(await self.lifecycle.unload(request.path_params["name"]))

    async def get_status(self, request: Request) -> Response:
        """Return the data of the status page."""
        self.keys.require_admin(request.headers)
        with contextlib.suppress(Unavailable):  # Serve creates the router at the first call
            await self.replicas.limits()
        names = await self.intake.on_thread(self.registry.names)
        gateways, refused = await asyncio.gather(self.recent_requests(), self._refused_settings())
        return json_response(status_of(self.base, names, self.affinity.views(), gateways, refused))

    async def _refused_settings(self) -> list[dict[str, Any]]:
        gateways, replicas = await asyncio.gather(self.describe_gateways(), self.replicas.describe_all())
        return refused_settings([*gateways, *replicas])

    async def _body(self, request: Request) -> bytes:
        limit_bytes = min(_MAX_BODY_BYTES, self.limits.max_body_bytes)
        return await read_body(request, limit_bytes, self.limits.body_timeout_s)
