"""The HTTP routes of a gateway."""

from collections.abc import Awaitable, Callable, Collection, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.browsers import HostCheck, for_own_pages
from ranklet.cluster.ingress.drain import Drain, DrainMiddleware
from ranklet.cluster.ingress.edge import OtherOrigins, PlainPaths
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.refusals import on_error, on_http_error
from ranklet.cluster.ingress.tokenize import TokenizeApi
from ranklet.replicas.errors import RankletError

Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    *,
    inference: Mapping[str, Handler],
    tokens: TokenizeApi,
    models: ModelsApi,
    admin: AdminApi,
    probes: ProbesApi,
    drain: Drain,
    origins: Collection[str] = (),
    host_names: Collection[str] | None = None,
) -> Starlette:
    """Build the ASGI app that Serve runs in each gateway.

    Args:
        inference: the handlers of inference calls by path.
        origins: other origins whose pages may use the API, see `security.allowed_origins`.
        host_names: the only names, besides localhost, that requests may be sent to; None for any.
    """
    routes = [
        *(_route("POST", path, handler) for path, handler in inference.items()),
        _route("POST", "/tokenize", tokens.tokenize),
        _route("POST", "/detokenize", tokens.detokenize),
        _route("GET", "/tokenizer_info", tokens.tokenizer_info),
        _route("GET", "/v1/models", models.list_models),
        _route("GET", "/v1/models/{name:path}", models.get_model),
        _route("GET", "/v1/adapters", admin.list_adapters),
        _route("POST", "/v1/adapters", for_own_pages(admin.load_adapter)),
        _route("GET", "/v1/adapters/{name:path}", admin.get_adapter),
        _route("DELETE", "/v1/adapters/{name:path}", for_own_pages(admin.delete_adapter)),
        _route("POST", "/v1/load_lora_adapter", for_own_pages(admin.load_adapter)),
        _route("POST", "/load_lora_adapter", for_own_pages(admin.load_adapter)),
        _route("POST", "/v1/unload_lora_adapter", for_own_pages(admin.unload_adapter)),
        _route("POST", "/unload_lora_adapter", for_own_pages(admin.unload_adapter)),
        _route("GET", "/v1/status", admin.get_status),
        _route("GET", "/", probes.page),
        _route("GET", "/openapi.json", probes.openapi),
        _route("GET", "/health", probes.health),
        _route("GET", "/ready", probes.ready),
        _route("GET", "/version", probes.version),
        _route("GET", "/metrics/targets", probes.metrics_targets),
    ]
    errors = {HTTPException: on_http_error, RankletError: on_error, Exception: on_error}
    layers = [
        *([] if host_names is None else [Middleware(HostCheck, names=host_names)]),
        *([Middleware(OtherOrigins, origins=origins)] if origins else []),
        Middleware(PlainPaths),
        Middleware(DrainMiddleware, drain=drain),
    ]
    app = Starlette(routes=routes, middleware=layers, exception_handlers=errors)
    app.router.redirect_slashes = False
    return app


def _route(method: str, path: str, handler: Handler) -> Route:
    return Route(path, handler, methods=[method])  # Starlette adds HEAD to GET
