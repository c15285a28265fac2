"""HTTP handlers for operators and monitoring. They need no key."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.datapath import versions
from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.openapi import document
from ranklet.cluster.ingress.page import page_response
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.message import GatewayDescription, ReplicaDescription
from ranklet.replicas.errors import Unavailable


@dataclass(frozen=True)
class ProbesApi:
    """Handlers of health checks, metrics targets, the API description and the status page.

    Attributes:
        describe_gateways: returns the descriptions of all live gateways.
        requests_in_flight: returns how many requests all gateways work on.
    """

    replicas: ReplicasClient
    describe_gateways: Callable[[], Awaitable[list[GatewayDescription]]]
    drain: Drain
    requests_in_flight: Callable[[], Awaitable[int]]

    async def health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer 200 if a replica answers and its engine is healthy. Raises Unavailable with the reason otherwise.

        While the cluster stops, answer 503 with the number of requests that are still worked on.
        """
        if self.drain.is_on:
            return json_response({"status": "stopping", "in_flight": await self.requests_in_flight()}, 503)
        replica = await self.replicas.describe()
        if replica.problem is not None:
            raise Unavailable(f"expected a healthy engine, but replica {replica.id} reports: {replica.problem}")
        return json_response({"status": "ready", "replica": replica.id})

    async def version(self, request: Request) -> Response:
        return json_response(versions())

    async def metrics_targets(self, request: Request) -> Response:
        """List the exporters of all live gateways and replicas, for Prometheus' `http_sd`."""
        gateways, replicas = await asyncio.gather(self.describe_gateways(), self.replicas.describe_all())
        processes: list[GatewayDescription | ReplicaDescription] = [*gateways, *replicas]
        exporters = [each for each in processes if each.metrics_target]
        return json_response([{"targets": [each.metrics_target], "labels": each.labels} for each in exporters])

    async def openapi(self, request: Request) -> Response:
        return json_response(document())

    async def page(self, request: Request) -> Response:
        """Return the status page. Its script fetches `/v1/status` every two seconds."""
        return page_response()
