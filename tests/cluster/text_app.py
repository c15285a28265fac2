"""An application whose gateway answers text requests as JSON, for tests of the way of tokens through Ray Serve."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import ROUTER
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.text_call import Logprobs
from ranklet.cluster.message import Begun, ReportReceiver
from ranklet.cluster.replica.deployment import Replica
from ranklet.cluster.replica.gateways_client import GATEWAY
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import RankletError
from ranklet.routing.affinity import Affinity
from ranklet.routing.binding import bind
from ranklet.routing.counters import Counters
from ranklet.routing.hint import HINT, RoutingHint
from ranklet.routing.report import StateReport

_STOLEN_HINT_ID = -5


@dataclass
class SeenText:
    """What one request has received so far."""

    most: int
    begun: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    receipts: int = 0
    error: str = ""
    answer: list[list[int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    first_s: float = 0.0
    end_ids: frozenset[int] = frozenset()

    def begin(self, begun: Begun) -> None:
        self.begun.append(asdict(begun))

    def receive(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> bool:
        self.first_s = self.first_s or time.time()
        self.receipts += 1
        known = self.tokens.setdefault(index, [])
        known += tokens
        self.logprobs += logprobs or ()
        return len(known) < self.most


@serve.ingress()
class TextGateway(ReportReceiver):
    """The text path of a gateway, without HTTP's forms."""

    def __init__(self, args: AppArgs, replica: "DeploymentHandle[Any]") -> None:
        self._id = serve.get_replica_context().replica_id.unique_id
        self._affinity = Affinity()
        bind(self._affinity, Counters())
        self._registry = Registry(args.adapters_dir, args.adapters)
        self._handle = replica
        self._retries = self._continuations = 0
        self._replicas = ReplicasClient(replica, self._affinity, args.limits, self._count_repeat, self._id)
        self._seen: dict[str, SeenText] = {}
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._watching: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/generate/{id}", self.generate, methods=["POST"]),
                Route("/seen/{id}", self.seen),
                Route("/cancel/{id}", self.cancel, methods=["POST"]),
                Route("/take_feed/{replica}", self.take_feed, methods=["POST"]),
                Route("/ready", self.state),
                Route("/metrics/targets", self.targets),
            ]
        )

    def _count_repeat(self, continues: bool) -> None:
        self._retries += 1
        self._continuations += continues

    async def check_health(self) -> None:
        self._replicas.feeds.update()
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._replicas.watchdog.run())

    async def on_report(self, report: StateReport) -> str:
        self._affinity.on_report(report, self._id, time.time() - report.load.at_s)
        self._replicas.feeds.update()
        return self._id

    async def generate(self, request: Request) -> Response:
        """Run one request: {adapter, prompts, params, most}."""
        body = await request.json()
        seen = self._seen[request.path_params["id"]] = SeenText(body.get("most", 1 << 30))
        adapter = self._registry.locate(body["adapter"]) if body.get("adapter") else None
        prompts = [np.array(prompt, np.int32) for prompt in body["prompts"]]
        generating = self._replicas.generate(adapter, prompts, GenerateParams(**body["params"]), seen)
        running = self._running[request.path_params["id"]] = asyncio.ensure_future(generating)
        try:
            replies = await running
        except asyncio.CancelledError:
            seen.error = "cancelled"
        except RankletError as error:
            seen.error = f"{error.code}: {error.message}"
        else:
            choices = [choice for reply in replies for choice in reply.result.choices]
            seen.answer = [choice.ids().tolist() for choice in choices]
            seen.reasons = [choice.finish_reason for choice in choices]
        return _json(seen)

    async def seen(self, request: Request) -> Response:
        seen = self._seen.get(request.path_params["id"])
        return _json(seen) if seen else Response(status_code=404)

    async def cancel(self, request: Request) -> Response:
        """Cancel a request, as Serve does when its client disconnects."""
        self._running[request.path_params["id"]].cancel()
        return Response()

    async def take_feed(self, request: Request) -> Response:
        """Open a second feed in this gateway's name, which ends the first, read one message and close it."""
        replica = request.path_params["replica"]
        hint = {HINT: RoutingHint(_STOLEN_HINT_ID, only=replica)}
        feed: Any = self._handle.options(method_name="feed", stream=True).remote(self._id, replica, **hint)
        taken = 0
        async for messages in feed:
            taken += len(messages)
            if taken:
                break
        feed.cancel()
        return JSONResponse({"taken": taken})

    async def state(self, request: Request) -> Response:
        await self._replicas.limits()
        feeds = self._replicas.feeds
        return JSONResponse(
            {
                "opened": feeds.opened,
                "gaps": feeds.gaps,
                "feeds": sorted(feeds.replicas),
                "retries": self._retries,
                "continuations": self._continuations,
            }
        )

    async def targets(self, request: Request) -> Response:
        described = await self._replicas.describe_all()
        return JSONResponse([{"labels": each.labels, "targets": [each.metrics_target]} for each in described])


def _json(seen: SeenText) -> Response:
    return JSONResponse({name: value for name, value in vars(seen).items() if name != "end_ids"})


def build(args: AppArgs) -> Application:
    """Build the application with the deployments' usual names."""
    args = args.resolved()
    common: dict[str, Any] = {
        "health_check_period_s": 1,
        "graceful_shutdown_timeout_s": 5,
        "max_ongoing_requests": 1000,
    }
    router = RequestRouterConfig.model_validate({"request_router_class": ROUTER})
    replica = serve.deployment(name="Replica", request_router_config=router, **common)(Replica)
    gateway = serve.deployment(name=GATEWAY, **common)(TextGateway)
    return gateway.bind(args, replica.bind(args))
