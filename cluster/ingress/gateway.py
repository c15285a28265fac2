"""The HTTP ingress: stateless, as many as CPU cores allow. Parses and tokenises, asks a replica, answers."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.broadcast import broadcast
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import AppArgs, GatewayUserConfig, SecurityConfig
from ranklet.cluster.datapath import DataPath, log_missing_token, versions
from ranklet.cluster.exporter import Exporter
from ranklet.cluster.ingress.answers import model_card, render
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import take_in
from ranklet.cluster.ingress.ledger import LedgerActor
from ranklet.cluster.ingress.lifecycle import Lifecycle, LoadRequest, UnloadRequest
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer, RequestRecord
from ranklet.cluster.ingress.openapi import document
from ranklet.cluster.ingress.protocol import parse_body
from ranklet.cluster.ingress.refusals import on_error, on_http_error, refuse
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.status import PAGE, RecentRequests, status
from ranklet.cluster.message import GatewayDescription, ReplicaDescription
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InternalError, InvalidRequest, RankletError, Unavailable
from ranklet.replicas.model.tokenizer import PromptTokenizer
from ranklet.routing.affinity import Affinity
from ranklet.routing.binding import bind
from ranklet.routing.counters import Counters
from ranklet.routing.report import StateReport

T = TypeVar("T")

_TOKENISERS = 4  # threads; the tokenizer itself runs outside the GIL
_RENDER_INLINE_BYTES = 1 << 20  # larger answers are rendered on a thread
_CLIENT_GONE = 499
_MOST_ADMIN_BODY = 1 << 16

logger = logging.getLogger("ray.serve")

app = FastAPI(title="ranklet", docs_url=None, redoc_url=None, openapi_url=None)
app.add_exception_handler(HTTPException, on_http_error)
app.add_exception_handler(RankletError, on_error)
app.add_exception_handler(Exception, on_error)


def _target_group(process: ReplicaDescription | GatewayDescription) -> dict[str, Any]:
    return {"targets": [process.metrics_target], "labels": process.labels}


def _admin_is_open(security: SecurityConfig) -> bool:
    """Whether calls without a key may change adapters, where there are no keys."""
    if security.open_admin is not None:
        return security.open_admin
    client = _get_global_client()
    host = (client.http_config.host if client else None) or ""
    return host == "localhost" or host.startswith("127.")


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


# Helpers of the routes stand above: Serve pickles the app, routes and all, at the moment this decorator runs.
@serve.ingress(app)
class Gateway:
    """One gateway process. Holds caches, no state: any gateway answers any request."""

    def __init__(self, args: AppArgs, replica: "DeploymentHandle[Any]") -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._here = (context.deployment, context.app_name)
        self._args = args
        self._names = ModelNames(args.base_names, Registry(args.adapters_dir, args.adapters))
        self._tokenizer = PromptTokenizer(args.base.model_dir)
        self._threads = ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="intake")
        self._affinity, choices = Affinity(), Counters()
        bind(self._affinity, choices)  # before the first call through `replica`: Ray then creates the router
        self._metrics = GatewayMetrics(args.metrics.top_adapters, choices)
        limits = args.limits
        self._replicas = ReplicasClient(
            replica,
            self._affinity,
            limits.request_timeout_s,
            self._metrics.retries.inc,
            self._id,
            limits.no_replica_timeout_s,
        )
        self._watch: asyncio.Task[None] | None = None
        self._keys = ApiKeys(args.security.keys_file, open_admin=_admin_is_open(args.security))
        roots = [root for root in (args.adapters_dir, *args.security.adapter_roots) if root is not None]
        self._lifecycle = Lifecycle(
            self._names.registry,
            self._replicas,
            lambda: serve.get_deployment_handle(*self._here),
            roots,
            args.sources.allowed,
        )
        self._engine_limits: RequestLimits | None = None
        self._admission = Admission(args.limits.max_in_flight_requests, self._metrics.in_flight.set)
        self._quotas = Quotas(LedgerActor(context.app_name), self._over_quota)
        self._recent = RecentRequests()
        self._observer = Observer(self._metrics, self._recent, args.log.requests, self._id)
        self._target = Exporter.start(self._metrics.registry, args.metrics).target
        logger.info("gateway %s: %s; metrics on %s", self._id, DataPath.current().summary(), self._target)
        log_missing_token()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config: {adapters: ..., tokens_per_minute: ...}`, changed without a restart.

        The adapters are on top of the configured ones.
        """
        config = GatewayUserConfig.model_validate(user_config)
        self._names.registry.set_user_config({name: path.absolute() for name, path in config.adapters.items()})
        self._quotas.set_model_quotas(config.tokens_per_minute)

    def _over_quota(self, by: str, model: str) -> None:
        label = self._metrics.labels.label(None if model == self._names.base else model, 0)
        self._metrics.quota_rejections.labels(by, label).inc()

    @app.post("/v1/embeddings")
    async def embeddings(self, request: Request) -> Response:
        """OpenAI's embeddings API."""
        outcome = self._observer.begin(request.headers)
        try:
            response = await self._embed(request, outcome)
        except RankletError as error:
            response, outcome.status, outcome.code = refuse(error), error.status, error.code
            # What a client sent may stand in the message that says what is wrong with it.
            outcome.message = f"in {error.param}" if isinstance(error, InvalidRequest) else error.message
        except ClientDisconnect:
            self._observer.left(outcome)
            return Response(status_code=_CLIENT_GONE)  # for Ray's log: nobody reads it
        except asyncio.CancelledError:
            self._observer.left(outcome)
            raise
        except Exception as error:
            response, outcome.status, outcome.code = await on_error(request, error), 500, InternalError.code
        self._observer.answered(outcome)
        return response

    async def _embed(self, request: Request, outcome: RequestRecord) -> Response:
        key = self._keys.authenticate(request.headers)
        body = await self._body(request, self._args.limits.max_body_bytes)
        with self._admission.admit():
            limits = await self._limits()
            max_texts = self._args.limits.max_texts_per_request
            intake = await self._on_thread(partial(take_in, body, self._names, self._tokenizer, max_texts, limits))
            adapter, wanted = intake.adapter, intake.request
            name = adapter.name if adapter else self._names.base
            self._keys.authorize(key, name)
            outcome.label = self._metrics.labels.label(adapter.name if adapter else None)
            outcome.model, outcome.prompts, outcome.tokens = name, len(intake.prompts), intake.tokens
            with self._admission.admit_model(name), self._quotas.charge(key, name, outcome.tokens):
                answer = outcome.answer = await self._replicas.embed(
                    adapter, intake.prompts, wanted.dimensions, limits.hidden
                )
            rendering = partial(render, answer, wanted.model or name, wanted.encoding_format)
            large = answer.vectors.nbytes > _RENDER_INLINE_BYTES
            content = await self._on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _limits(self) -> RequestLimits:
        """Raises Unavailable when no replica has answered yet."""
        if self._engine_limits is None:
            self._engine_limits = (await self._replicas.describe()).limits
        return self._engine_limits

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The base and every adapter that the key may use, as OpenAI's cards."""
        key, max_len = self._keys.authenticate(request.headers), await self._max_model_len()
        return _json({"object": "list", "data": await self._on_thread(partial(self._cards, key, max_len))})

    def _cards(self, key: ApiKey | None, max_len: int | None) -> list[dict[str, Any]]:
        base = self._names.base
        cards = [self._card(None, max_len)] if key is None or key.may_use(base) else []
        for adapter, written_s in self._names.registry.scan():
            if key is None or key.may_use(adapter.name):
                cards.append(self._card(adapter, max_len, written_s))
        return cards

    @app.get("/v1/models/{name:path}")
    async def model(self, request: Request, name: str) -> Response:
        """One card, by any name that `model` may be; 404 with near names otherwise."""
        key, adapter = self._keys.authenticate(request.headers), self._names.resolve(name)
        self._keys.authorize(key, adapter.name if adapter else self._names.base)
        if adapter is not None:
            await self._lifecycle.check(adapter)
        return _json(self._card(adapter, await self._max_model_len()))

    # Adapters by name: an admin's calls

    @app.get("/v1/adapters")
    async def adapters(self, request: Request) -> Response:
        """Every adapter with its state, and where it is."""
        self._keys.require_admin(request.headers)
        return _json({"object": "list", "data": await self._lifecycle.list()})

    @app.get("/v1/adapters/{name}")
    async def adapter(self, request: Request, name: str) -> Response:
        """One of them."""
        self._keys.require_admin(request.headers)
        return _json(await self._lifecycle.show(name))

    @app.post("/v1/adapters")
    @app.post("/v1/load_lora_adapter")
    @app.post("/load_lora_adapter")
    async def load_adapter(self, request: Request) -> Response:
        """Load an adapter, or replace one; see `LoadRequest`."""
        self._keys.require_admin(request.headers)
        return _json(await self._lifecycle.load(parse_body(await self._small_body(request), LoadRequest)))

    @app.post("/v1/unload_lora_adapter")
    @app.post("/unload_lora_adapter")
    async def unload_adapter(self, request: Request) -> Response:
        """Serve an adapter no more."""
        self._keys.require_admin(request.headers)
        return _json(await self._lifecycle.unload(parse_body(await self._small_body(request), UnloadRequest).name))

    @app.delete("/v1/adapters/{name}")
    async def delete_adapter(self, request: Request, name: str) -> Response:
        """The same."""
        self._keys.require_admin(request.headers)
        return _json(await self._lifecycle.unload(name))

    async def book_changed(self) -> None:
        """Another gateway has loaded or unloaded an adapter."""
        book = self._names.registry.overrides
        if book is not None:
            await self._on_thread(partial(book.entries, fresh=True))

    async def _small_body(self, request: Request) -> bytes:
        return await self._body(request, min(_MOST_ADMIN_BODY, self._args.limits.max_body_bytes))

    async def _body(self, request: Request, limit_bytes: int) -> bytes:
        return await read_body(request, limit_bytes, self._args.limits.body_timeout_s)

    def _card(
        self, adapter: AdapterLocation | None, max_len: int | None, written_s: int | None = None
    ) -> dict[str, Any]:
        base, folder = self._names.base, self._args.base.model_dir
        if adapter is None:
            made_s = int(folder.stat().st_mtime)
            return model_card(base, base=None, root=str(folder), created_s=made_s, max_model_len=max_len)
        made_s = adapter.modified_s() if written_s is None else written_s
        return model_card(adapter.name, base=base, root=adapter.source, created_s=made_s, max_model_len=max_len)

    async def _max_model_len(self) -> int | None:
        with contextlib.suppress(Unavailable):
            return (await self._limits()).max_model_len
        return None

    @app.get("/")
    async def page(self) -> Response:
        """The status page: HTML that asks for `/v1/status` every two seconds."""
        return Response(PAGE.read_bytes(), media_type="text/html")

    @app.get("/v1/status")
    async def status(self, request: Request) -> Response:
        """What the page shows; an admin's call."""
        self._keys.require_admin(request.headers)
        await self._max_model_len()  # a router hears of replicas once it has been used
        seen = self._affinity.views()
        gateways = await broadcast(serve.get_deployment_handle(*self._here), "recent")
        names = await self._on_thread(self._names.registry.names)
        return _json(status(self._names.base, names, seen, gateways or [await self.recent()]))

    async def recent(self) -> dict[str, Any]:
        """What this gateway remembers of its requests."""
        return self._recent.told(self._admission.in_flight)

    @app.get("/openapi.json")
    async def openapi(self) -> Response:
        """This API, described."""
        return _json(document())

    @app.get("/health")
    async def health(self) -> Response:
        """This process is up."""
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready(self) -> Response:
        """A replica answers and its engine is healthy; 503 otherwise."""
        replica = await self._replicas.describe()
        if not replica.healthy:
            raise Unavailable(f"expected a healthy engine; the one of replica {replica.id} has stopped")
        return _json({"status": "ready", "replica": replica.id})

    @app.get("/version")
    async def version(self) -> Response:
        """Versions, and the data path this request came by."""
        return _json(versions())

    @app.get("/metrics/targets")
    async def metrics_targets(self) -> Response:
        """Prometheus `http_sd`: the exporters of all live gateways and replicas."""
        gateways = broadcast(serve.get_deployment_handle(*self._here), "describe")
        found = [each for group in await asyncio.gather(gateways, self._replicas.describe_all()) for each in group]
        return _json([_target_group(each) for each in found or [await self.describe()] if each.metrics_target])

    async def told(self, report: StateReport) -> str:
        """A replica says how it stands; it is told who has heard."""
        self._affinity.on_report(report, self._id, time.time() - report.load.at_s)
        return self._id

    async def check_health(self) -> None:
        """Called by Serve once a second; from its first call on, this gateway watches over its calls."""
        if self._watch is None or self._watch.done():
            self._watch = asyncio.ensure_future(self._replicas.watch())

    async def describe(self) -> GatewayDescription:
        """This gateway for its siblings."""
        return GatewayDescription(self._id, os.getpid(), self._target)
