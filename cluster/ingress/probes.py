"""HTTP handlers for operators and monitoring, open to everybody."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.datapath import versions
from ranklet.cluster.ingress.openapi import document
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.ingress.status import PAGE
from ranklet.cluster.message import GatewayDescription
from ranklet.replicas.errors import Unavailable


class ProbesApi:
    """Handlers of health checks, metrics targets, the API description and the status page.

    Args:
        describe_gateways: describes all live gateways.
    """

    def __init__(
        self, replicas: ReplicasClient, describe_gateways: Callable[[], Awaitable[list[GatewayDescription]]]
    ) -> None:
        self._replicas = replicas
        self._describe_gateways = describe_gateways

    async def health(self, request: Request) -> Response:
        """This process is up."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """A replica answers and its engine is healthy; 503 otherwise."""
        replica = await self._replicas.describe()
        if not replica.healthy:
            raise Unavailable(f"expected a healthy engine, but the engine of replica {replica.id} has stopped")
        return json_response({"status": "ready", "replica": replica.id})

    async def version(self, request: Request) -> Response:
        """Installed versions and the data path."""
        return json_response(versions())

    async def metrics_targets(self, request: Request) -> Response:
        """Prometheus `http_sd`: the exporters of all live gateways and replicas."""
        gateways, replicas = await asyncio.gather(self._describe_gateways(), self._replicas.describe_all())
        groups = [{"targets": [each.metrics_target], "labels": each.labels} for each in gateways if each.metrics_target]
        groups += [
            {"targets": [each.metrics_target], "labels": each.labels} for each in replicas if each.metrics_target
        ]
        return json_response(groups)

    async def openapi(self, request: Request) -> Response:
        return json_response(document())

    async def page(self, request: Request) -> Response:
        """The status page, which fetches `/v1/status` every two seconds."""
        return Response(PAGE.read_bytes(), media_type="text/html")
