"""HTTP handlers for administrators: adapters by name, and the data of the status page."""

import contextlib
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.lifecycle import Lifecycle, LoadRequest, UnloadRequest
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.protocol import parse_body
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.status import status_of
from ranklet.replicas.errors import Unavailable
from ranklet.routing.affinity import Affinity

_MAX_BODY_BYTES = 1 << 16


class _RecentOfGateways(Protocol):
    async def __call__(self) -> list[dict[str, Any]]:
        """`RecentRequests.as_dict` of all gateways."""


class AdminApi:
    """Handlers that require a key with admin rights, or `security.open_admin` where there are no keys."""

    def __init__(self, keys: ApiKeys, limits: LimitsConfig, lifecycle: Lifecycle, adapter_cards: AdapterCards) -> None:
        self._keys = keys
        self._limits = limits
        self._lifecycle = lifecycle
        self._adapter_cards = adapter_cards

    async def list_adapters(self, request: Request) -> Response:
        """All adapters with their states and replicas."""
        self._keys.require_admin(request.headers)
        return json_response({"object": "list", "data": await self._adapter_cards.cards()})

    async def get_adapter(self, request: Request) -> Response:
        self._keys.require_admin(request.headers)
        return json_response(await self._adapter_cards.card(request.path_params["name"]))

    async def load_adapter(self, request: Request) -> Response:
        """Load or replace an adapter; see `LoadRequest`."""
        self._keys.require_admin(request.headers)
        return json_response(await self._lifecycle.load(parse_body(await self._body(request), LoadRequest)))

    async def unload_adapter(self, request: Request) -> Response:
        self._keys.require_admin(request.headers)
        name = parse_body(await self._body(request), UnloadRequest).name
        return json_response(await self._lifecycle.unload(name))

    async def delete_adapter(self, request: Request) -> Response:
        self._keys.require_admin(request.headers)
        return json_response(await self._lifecycle.unload(request.path_params["name"]))

    async def _body(self, request: Request) -> bytes:
        limit_bytes = min(_MAX_BODY_BYTES, self._limits.max_body_bytes)
        return await read_body(request, limit_bytes, self._limits.body_timeout_s)


class StatusApi:
    """Handler of `/v1/status`.

    Args:
        recent: collects the recent requests of all gateways.
    """

    def __init__(
        self,
        keys: ApiKeys,
        names: ModelNames,
        intake: Intake,
        replicas: ReplicasClient,
        affinity: Affinity,
        recent: _RecentOfGateways,
    ) -> None:
        self._keys = keys
        self._names = names
        self._intake = intake
        self._replicas = replicas
        self._affinity = affinity
        self._recent = recent

    async def get_status(self, request: Request) -> Response:
        """The data of the status page."""
        self._keys.require_admin(request.headers)
        with contextlib.suppress(Unavailable):  # the router learns of replicas when it is first used
            await self._replicas.limits()
        names = await self._intake.on_thread(self._names.registry.names)
        gateways = await self._recent()
        return json_response(status_of(self._names.base, names, self._affinity.views(), gateways))
