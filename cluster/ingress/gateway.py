"""The Serve deployment that answers HTTP. Any gateway answers any request; run one per CPU core."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaRank
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.broadcast import broadcast
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.source import AllowedSources
from ranklet.cluster.config import AppArgs, GatewayUserConfig
from ranklet.cluster.datapath import DataPath, http_host, is_loopback, refuse_missing_token
from ranklet.cluster.exporter import start_exporter
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.chat_task import ChatTask
from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.embedding_models import EmbeddingModels
from ranklet.cluster.ingress.embeddings import EmbeddingsTask
from ranklet.cluster.ingress.exchange import Exchange, InferenceServices
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.ledger import LedgerActor
from ranklet.cluster.ingress.lifecycle import Lifecycle
from ranklet.cluster.ingress.memory import map_large_blocks
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.routes import Handler, build_app
from ranklet.cluster.ingress.scoring import SCORING_PATHS
from ranklet.cluster.ingress.shutdown import GatewayShutdown, ask_controller
from ranklet.cluster.ingress.status import RecentRequests
from ranklet.cluster.ingress.task import ParseTask
from ranklet.cluster.ingress.text_task import CompletionsTask
from ranklet.cluster.ingress.texts import TextModels
from ranklet.cluster.ingress.tokenize import TokenizeApi
from ranklet.cluster.logs import escape_log
from ranklet.cluster.message import GatewayDescription, ReportReceiver
from ranklet.cluster.settings.keeper import KeeperActor
from ranklet.cluster.settings.setting import Setting
from ranklet.cluster.settings.settings import Settings
from ranklet.cluster.settings.user_config import read_user_config
from ranklet.replicas.model.tokenizer import FolderTokenizer, PromptTokenizer
from ranklet.replicas.model.tokenizer_reader import read_backend
from ranklet.routing.affinity import Affinity
from ranklet.routing.binding import bind
from ranklet.routing.counters import Counters
from ranklet.routing.report import StateReport

logger = logging.getLogger("ray.serve")


@serve.ingress()
class Gateway(ReportReceiver):
    """One gateway process. Its state is a cache, or shared through the quota ledger and the overrides file.

    Without an argument, `serve.ingress` gets the app from `__serve_build_asgi_app__`, so routes are not pickled.
    """

    def __init__(self, args: AppArgs, replica: "DeploymentHandle[Any]") -> None:
        escape_log()
        map_large_blocks()
        self._http_host = http_host()
        refuse_missing_token(open_ray=args.security.open_ray)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._deployment = context.deployment, context.app_name
        self._args = args
        self._affinity, routing_counters = Affinity(), Counters()
        bind(self._affinity, routing_counters)  # before the first call through `replica`, which creates the router
        self._metrics = GatewayMetrics(args.metrics.top_adapters, routing_counters, args.base_names[0])
        self._settings = Settings(KeeperActor(context.app_name, context.deployment))
        self._metrics.registry.register(self._settings)
        self._user_config: Setting[GatewayUserConfig] = self._settings.setting("user_config", ValueError)
        self._registry = Registry(
            args.adapters_dir, args.adapters, args.base_names, self._settings,
            AllowedSources(args.adapter_roots, args.sources.allowed),
        )  # fmt: skip
        self._names = ModelNames(args.base_names, self._registry)
        model_dir = args.base.model_dir
        tokenizer = PromptTokenizer(model_dir, FolderTokenizer.read(model_dir, read_backend))
        self._intake = Intake(tokenizer, args.limits)
        open_admin = args.security.open_admin or False
        self._keys = ApiKeys(args.security.keys_file, open_admin=open_admin, settings=self._settings)
        self._admission = Admission(args.limits.max_in_flight_requests, self._metrics.in_flight.set)
        self._quotas = Quotas(LedgerActor(context.app_name), self._on_over_quota, names_of=self._names.names_of)
        self._drain = Drain()
        self._recent = RecentRequests()
        self._observer = Observer(self._metrics, self._recent, args.log.requests, self._id)
        self._replicas = ReplicasClient(
            replica, self._affinity, args.limits, self._metrics.on_repeat, self._id,
            lambda name, source: self._broadcast("on_load_crashed", name, source),
        )  # fmt: skip
        self._texts = TextModels(tokenizer, model_dir, self._replicas, args.text)
        self._embeddings = EmbeddingModels(tokenizer.settings, self._texts.descriptions)
        self._watching: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._shutdown = GatewayShutdown(
            partial(ask_controller, context.app_name, context.deployment, self._id), self._replicas.watchdog.end_calls
        )
        self._ending: asyncio.Task[None] | None = None
        self._metrics_target = start_exporter(self._metrics.registry, args.metrics)
        logger.info("gateway %s: %s; metrics on %s", self._id, DataPath.current().summary(), self._metrics_target)
        if problem := self._registry.root_problem():
            logger.warning("adapters_dir: %s", problem)

    def __serve_build_asgi_app__(self) -> Starlette:
        args, keys, registry, intake, replicas = self._args, self._keys, self._registry, self._intake, self._replicas
        cards = AdapterCards(registry, replicas, args.adapter_roots, args.sources.max_adapter_bytes)
        return build_app(
            inference={
                "/v1/embeddings": self._inference_handler(partial(EmbeddingsTask.parse, self._embeddings)),
                "/v1/completions": self._inference_handler(partial(CompletionsTask.parse, self._texts)),
                "/v1/chat/completions": self._inference_handler(partial(ChatTask.parse, self._texts)),
                **self._scoring_handlers(),
            },
            tokens=TokenizeApi(args.limits, keys, self._admission, self._names, intake, replicas, self._texts),
            models=ModelsApi(keys, self._names, registry, args.base.model_dir, intake, replicas, cards, self._texts),
            admin=AdminApi(
                keys=keys,
                limits=args.limits,
                base=self._names.base,
                registry=registry,
                intake=intake,
                replicas=replicas,
                affinity=self._affinity,
                lifecycle=self._lifecycle(),
                cards=cards,
                recent_requests=self._recent_of_gateways,
                describe_gateways=self._describe_gateways,
            ),
            probes=ProbesApi(replicas, self._describe_gateways, self._drain, self._requests_in_flight),
            drain=self._drain,
            origins=args.security.allowed_origins,
            host_names=args.security.host_names if is_loopback(self._http_host) else None,
        )

    def _inference_handler(self, parse: ParseTask) -> Handler:
        services = InferenceServices(
            limits=self._args.limits,
            keys=self._keys,
            admission=self._admission,
            names=self._names,
            quotas=self._quotas,
            intake=self._intake,
            replicas=self._replicas,
            observer=self._observer,
        )

        async def answer(request: Request) -> Response:
            return await Exchange(services, parse, request).answer()

        return answer

    def _scoring_handlers(self) -> dict[str, Handler]:
        described = self._texts.descriptions
        return {
            path: self._inference_handler(partial(parse, described))
            for parse, paths in SCORING_PATHS.items() for path in paths
        }  # fmt: skip

    def _lifecycle(self) -> Lifecycle:
        args = self._args
        return Lifecycle(
            self._registry,
            self._replicas,
            lambda: self._broadcast("on_overrides_changed"),
            args.adapter_roots,
            args.sources.allowed,
        )

    def reconfigure(self, user_config: dict[str, Any] | None, rank: ReplicaRank) -> None:
        """Apply `user_config`, see `GatewayUserConfig`. Serve calls this at the start and at each change.

        The adapters are served in addition to those of the application's args.

        Args:
            rank: not used. Without this parameter, Serve does not call when `user_config` is removed from the file.

        Raises:
            ValueError: it is faulty, and no gateway of the application has had a good one.
        """
        self._user_config.change(partial(read_user_config, GatewayUserConfig, user_config, "Gateway"))
        config = self._user_config.content
        self._registry.set_user_config({name: path.absolute() for name, path in config.adapters.items()})
        self._quotas.set_model_quotas(config.tokens_per_minute)

    async def check_health(self) -> None:
        """Start the tasks that need an event loop, if they are not running. Serve calls this once a second.

        Close feeds of replicas that have left, which wait for their end when they shut down.
        """
        escape_log()
        self._replicas.feeds.update()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.ensure_future(self._replicas.watchdog.run())
        if self._looking is None or self._looking.done():  # not awaited: the files' system may hang
            self._looking = asyncio.ensure_future(self._intake.on_thread(self._settings.look))
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._quotas.connect())
        self._shutdown.on_health_check()
        if self._ending is None or self._ending.done():
            self._ending = asyncio.ensure_future(self._shutdown.run())

    def __del__(self) -> None:
        """Close the feeds. Serve calls this once the requests have been answered."""
        replicas = getattr(self, "_replicas", None)
        if replicas is not None:
            replicas.feeds.stop()

    # Called by replicas and other gateways

    async def on_report(self, report: StateReport) -> str:
        self._affinity.on_report(report, self._id, time.time() - report.load.at_s)
        self._replicas.feeds.update()
        return self._id

    async def on_overrides_changed(self) -> None:
        """Read the overrides again, after a gateway has loaded or unloaded an adapter."""
        if self._registry.overrides is not None:
            await self._intake.on_thread(partial(self._registry.overrides.entries, fresh=True))

    async def on_load_crashed(self, name: str, source: str) -> None:
        """Do not try this adapter on other engines for a while."""
        self._replicas.suspects.add(name, source)

    async def recent_requests(self) -> dict[str, Any]:
        return self._recent.as_dict(self._admission.in_flight)

    async def describe(self) -> GatewayDescription:
        refused, problem = self._settings.refused(), await asyncio.to_thread(self._registry.root_problem)
        if problem is not None:
            refused["adapters_dir"] = problem
        return GatewayDescription(self._id, os.getpid(), self._metrics_target, refused)

    async def requests_in_flight(self) -> int:
        """Count the requests of this gateway. `ranklet down` polls it, so requests end here once a drain is over."""
        if self._drain.is_over:
            self._replicas.watchdog.end_calls()
        return self._drain.in_flight

    async def _broadcast(self, method: str, *arguments: Any, missing: Sequence[Any] = ()) -> list[Any]:
        return await broadcast(serve.get_deployment_handle(*self._deployment), method, *arguments, missing=missing)

    async def _requests_in_flight(self) -> int:
        return sum(await self._broadcast("requests_in_flight", missing=[1]))  # a silent gateway may work on one

    async def _recent_of_gateways(self) -> list[dict[str, Any]]:
        return await self._broadcast("recent_requests") or [await self.recent_requests()]

    async def _describe_gateways(self) -> list[GatewayDescription]:
        return await self._broadcast("describe") or [await self.describe()]

    def _on_over_quota(self, by: str, model: str) -> None:
        self._metrics.on_over_quota(by, None if model == self._names.base else model)
