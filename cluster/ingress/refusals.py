"""Every refusal as HTTP: one table from exceptions to status codes, and one error body.

Refusals of HTTP itself join the tree of `ranklet.replicas.errors`:
RankletError
├── BodyTooLarge        the body exceeds limits.max_body_bytes         413 body_too_large
├── BodyTooSlow         it did not come within limits.body_timeout_s   408 body_timeout
├── Unauthorized        no key, or an unknown one                      401 unauthorized
├── Forbidden           the key may not do this                        403 forbidden
├── OverQuota           the key's or the adapter's tokens are used up  429 rate_limit_exceeded
├── AdapterExists       loaded already, and not to be replaced         409 adapter_exists
└── NoRoute             no such path, or not with this method          404 not_found, 405 method_not_allowed
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.access.keys import Forbidden, Unauthorized
from ranklet.cluster.access.quota import OverQuota
from ranklet.cluster.ingress.lifecycle import AdapterExists
from ranklet.replicas.errors import (
    AdapterNotFound,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    ModelError,
    RankletError,
    Saturated,
    StillLoading,
    Unavailable,
    UnknownModel,
)

logger = logging.getLogger("ray.serve")


class BodyTooLarge(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The request's body is larger than the gateway accepts."""

    code = "body_too_large"


class BodyTooSlow(RankletError):  # noqa: N818
    """The client took too long to send its request."""

    code = "body_timeout"


class NoRoute(RankletError):  # noqa: N818
    """HTTP has no answer for this path and method."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = "method_not_allowed" if status == 405 else "not_found"


STATUS: Mapping[type[RankletError], int] = {
    InvalidRequest: 400,
    InvalidAdapter: 400,
    UnknownModel: 404,
    AdapterNotFound: 404,
    Unauthorized: 401,
    Forbidden: 403,
    AdapterExists: 409,
    BodyTooSlow: 408,
    BodyTooLarge: 413,
    OverQuota: 429,
    Saturated: 503,
    Unavailable: 503,
    StillLoading: 503,
    ModelError: 500,
    InternalError: 500,
}


def status_of(error: RankletError) -> int:
    """The HTTP status of a refusal; 500 for what is not in the table."""
    if isinstance(error, NoRoute):
        return error.status
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def body_of(error: RankletError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it."""
    kind = "invalid_request_error" if status_of(error) < 500 else "server_error"
    kind = "rate_limit_error" if isinstance(error, OverQuota) else kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def refuse(error: RankletError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a refused request; 503 and 429 say when to come back."""
    status = status_of(error)
    sent = dict(headers or {})
    if status in (429, 503):
        sent["retry-after"] = str(max(1, math.ceil(getattr(error, "retry_after_s", 1.0))))
    return Response(orjson.dumps(body_of(error)), status, sent, media_type="application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no route, wrong method) in our error body."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    reason = {404: "does not exist", 405: f"does not take {request.method}"}.get(status, f"failed with {status}")
    message = (
        f"{request.method} {request.url.path}: this path {reason}. Embeddings are asked for with POST /v1/embeddings"
    )
    return refuse(NoRoute(message, status), headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Refusals by the table; anything else is a defect, told without its insides and logged with them."""
    if isinstance(error, RankletError):
        return refuse(error)
    request_id = request.headers.get("x-request-id", "")
    logger.error("%s %s (%s) failed", request.method, request.url.path, request_id, exc_info=error)
    return refuse(InternalError(f"ranklet failed in an unexpected way. Its log says more at x-request-id {request_id}"))
