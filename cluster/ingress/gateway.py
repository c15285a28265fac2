"""The Serve deployment behind the HTTP ingress. Any gateway answers any request; run one per CPU core."""

import asyncio
import logging
import os
import time
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.broadcast import broadcast
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import AppArgs, GatewayUserConfig
from ranklet.cluster.datapath import DataPath, log_missing_token
from ranklet.cluster.exporter import Exporter
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.embeddings import EmbeddingsTask
from ranklet.cluster.ingress.exchange import Exchange, InferenceServices
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.ledger import LedgerActor
from ranklet.cluster.ingress.lifecycle import Lifecycle
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.routes import Handler, Handlers, build_app
from ranklet.cluster.ingress.status import RecentRequests
from ranklet.cluster.message import GatewayDescription
from ranklet.replicas.model.tokenizer import PromptTokenizer
from ranklet.routing.affinity import Affinity
from ranklet.routing.binding import bind
from ranklet.routing.counters import Counters
from ranklet.routing.report import StateReport

logger = logging.getLogger("ray.serve")


@serve.ingress()
class Gateway:
    """One gateway process. It holds caches, but no state that other gateways need.

    Without an argument, `serve.ingress` asks the instance for its app, so the routes need not be pickled.
    """

    def __init__(self, args: AppArgs, replica: "DeploymentHandle[Any]") -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._deployment = context.deployment, context.app_name
        self._args = args
        self._affinity, routing_counters = Affinity(), Counters()
        bind(self._affinity, routing_counters)  # before the first call through `replica`, which creates the router
        self._metrics = GatewayMetrics(args.metrics.top_adapters, routing_counters)
        self._names = ModelNames(args.base_names, Registry(args.adapters_dir, args.adapters))
        self._intake = Intake(self._names, PromptTokenizer(args.base.model_dir), args.limits)
        self._keys = ApiKeys(args.security.keys_file, open_admin=args.security.open_admin or False)
        self._admission = Admission(args.limits.max_in_flight_requests, self._metrics.in_flight.set)
        self._quotas = Quotas(LedgerActor(context.app_name), self._on_over_quota)
        self._recent = RecentRequests()
        self._observer = Observer(self._metrics, self._recent, args.log.requests, self._id)
        self._replicas = ReplicasClient(
            replica,
            self._affinity,
            args.limits.request_timeout_s,
            self._metrics.retries.inc,
            sender=self._id,
            no_replica_timeout_s=args.limits.no_replica_timeout_s,
        )
        self._watching: asyncio.Task[None] | None = None
        self._metrics_target = Exporter.start(self._metrics.registry, args.metrics).target
        logger.info("gateway %s: %s; metrics on %s", self._id, DataPath.current().summary(), self._metrics_target)
        log_missing_token()

    def __serve_build_asgi_app__(self) -> Starlette:  # the name is Serve's, see `serve.ingress`
        keys, names, intake, replicas = self._keys, self._names, self._intake, self._replicas
        cards = AdapterCards(names.registry, replicas)
        return build_app(
            Handlers(
                embeddings=self._embeddings_handler(),
                models=ModelsApi(keys, names, self._args.base.model_dir, intake, replicas, cards),
                admin=AdminApi(
                    keys=keys,
                    limits=self._args.limits,
                    names=names,
                    intake=intake,
                    replicas=replicas,
                    affinity=self._affinity,
                    lifecycle=self._lifecycle(),
                    cards=cards,
                    recent_requests=self._recent_of_gateways,
                ),
                probes=ProbesApi(replicas, self._describe_gateways),
            )
        )

    def _embeddings_handler(self) -> Handler:
        services = InferenceServices(
            base=self._names.base,
            limits=self._args.limits,
            keys=self._keys,
            admission=self._admission,
            intake=self._intake,
            quotas=self._quotas,
            replicas=self._replicas,
            observer=self._observer,
            label=self._metrics.labels.label,
        )

        async def embeddings(request: Request) -> Response:
            return await Exchange(services, EmbeddingsTask.parse, request).answer()

        return embeddings

    def _lifecycle(self) -> Lifecycle:
        args = self._args
        roots = [root for root in (args.adapters_dir, *args.security.adapter_roots) if root is not None]
        return Lifecycle(
            self._names.registry,
            self._replicas,
            lambda: self._broadcast("on_overrides_changed"),
            roots,
            args.sources.allowed,
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply `user_config: {adapters: ..., tokens_per_minute: ...}` without a restart.

        Its adapters are served in addition to those of the application's args.
        """
        config = GatewayUserConfig.model_validate(user_config)
        self._names.registry.set_user_config({name: path.absolute() for name, path in config.adapters.items()})
        self._quotas.set_model_quotas(config.tokens_per_minute)

    async def check_health(self) -> None:
        """Called by Serve once a second. The first call starts the watchdog, since it needs an event loop."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.ensure_future(self._replicas.watchdog.run())

    # Called by replicas and other gateways

    async def on_report(self, report: StateReport) -> str:
        """Handle a replica's state report.

        Returns:
            This gateway's id, so that the replica learns which gateways it reached.
        """
        self._affinity.on_report(report, self._id, time.time() - report.load.at_s)
        return self._id

    async def on_overrides_changed(self) -> None:
        """Read the overrides again: another gateway has loaded or unloaded an adapter."""
        overrides = self._names.registry.overrides
        if overrides is not None:
            await self._intake.on_thread(partial(overrides.entries, fresh=True))

    async def recent_requests(self) -> dict[str, Any]:
        return self._recent.as_dict(self._admission.in_flight)

    async def describe(self) -> GatewayDescription:
        return GatewayDescription(self._id, os.getpid(), self._metrics_target)

    async def _broadcast(self, method: str) -> list[Any]:
        return await broadcast(serve.get_deployment_handle(*self._deployment), method)

    async def _recent_of_gateways(self) -> list[dict[str, Any]]:
        return await self._broadcast("recent_requests") or [await self.recent_requests()]

    async def _describe_gateways(self) -> list[GatewayDescription]:
        return await self._broadcast("describe") or [await self.describe()]

    def _on_over_quota(self, by: str, model: str) -> None:
        self._metrics.on_over_quota(by, None if model == self._names.base else model)
