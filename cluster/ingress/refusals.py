"""Renders errors as HTTP answers, with the error's status and a body in the format of OpenAI's API."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from ranklet.cluster.ingress.responses import json_response
from ranklet.cluster.logs import log_place
from ranklet.replicas.errors import InternalError, RankletError

_TEXTS = "POST /v1/chat/completions and POST /v1/completions"
_EMBEDDINGS = "Embeddings are at POST /v1/embeddings"
_ALL = "GET /openapi.json describes all paths"
# What a path may be meant for: words in it, and what to use. The first line with a word of the path counts.
_HINTS: Sequence[tuple[Sequence[str], str]] = (
    (("/v1/v1",), "The path has /v1 twice. Leave it out of the base URL"),
    (("metrics",), "Each process has metrics of its own. GET /metrics/targets lists them, for Prometheus' http_sd"),
    (("adapter", "lora"), "Adapters are at GET /v1/adapters, POST /v1/load_lora_adapter and /v1/unload_lora_adapter"),
    (("rerank", "score", "classify", "pooling"), f"This API is not offered. {_EMBEDDINGS}"),
    (("embed", "encode"), _EMBEDDINGS),
    (("responses", "messages"), f"This API is not offered. Send the messages to {_TEXTS}"),
    (("audio", "images", "files", "batches", "moderations"), f"This API is not offered. {_ALL}"),
    (("complet", "chat", "generate", "invoke"), f"Texts are at {_TEXTS}"),
    (("token",), "Tokens are at POST /tokenize, POST /detokenize and GET /tokenizer_info"),
    (("model",), "Models are at GET /v1/models"),
    (("health", "ready", "live", "ping", "status"), "Probes are GET /health and GET /ready"),
    (("docs", "swagger", "openapi"), _ALL),
)

logger = logging.getLogger("ray.serve")


class PathNotFound(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """No route has this path."""

    code, status = "not_found", 404


class MethodNotAllowed(RankletError):  # noqa: N818
    """The path exists, but not with this HTTP method."""

    code, status = "method_not_allowed", 405


def body_of(error: RankletError) -> dict[str, Any]:
    """Return `{"error": {"message", "type", "param", "code"}}`, as in OpenAI's API."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def refuse(error: RankletError, headers: Mapping[str, str] | None = None) -> Response:
    """Render an error as an HTTP answer. Statuses 429 and 503 get a `Retry-After` header."""
    sent = dict(headers or {})
    if error.status in (429, 503):
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return json_response(body_of(error), error.status, sent)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Render an error of Starlette, such as an unknown path or a wrong method."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    path, sent = request.url.path, headers
    refusal: RankletError
    if status == 405:
        allowed = _allowed_methods(request)
        sent = {"allow": ", ".join(allowed)}
        hint = f"Use {' or '.join(allowed)}"
        if request.method == "OPTIONS":
            hint += ". Pages of other origins may use the API if security.allowed_origins has their origin"
        refusal = MethodNotAllowed(f"{request.method} {path}: this path does not accept {request.method}. {hint}")
    else:
        reason = "does not exist" if status == 404 else f"failed with {status}"
        refusal = PathNotFound(f"{request.method} {path}: this path {reason}. {_hint(path)}")
    refusal.status = status
    return refuse(refusal, sent)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes of a path. Starlette looks at the first of them only."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted(set().union(*found))


def _hint(path: str) -> str:
    path = path.lower()
    found = (hint for words, hint in _HINTS if any(word in path for word in words))
    return next(found, f"{_EMBEDDINGS}, texts at {_TEXTS}. {_ALL}")


async def on_error(request: Request, error: Exception) -> Response:
    """Render a `RankletError`. Any other exception is a defect, and only the log gets its details."""
    if isinstance(error, RankletError):
        return refuse(error)
    request_id = request.headers.get("x-request-id", "")
    what = f"{request.method} {request.url.path} ({request_id}) failed"
    return refuse(unexpected(what, error, f"x-request-id {request_id}"))


def unexpected(what: str, error: Exception, hint: str = "it") -> InternalError:
    """Log a defect, and return the error that the client gets."""
    logger.error("%s", what, exc_info=error)
    return InternalError(f"ranklet failed unexpectedly. Look for {hint} in {log_place()}")
