"""Renders errors as HTTP answers, with the error's status and a body in the format of OpenAI's API."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.ingress.responses import json_response
from ranklet.replicas.errors import InternalError, RankletError

_TEXTS = "POST /v1/chat/completions and POST /v1/completions"
# Paths of other APIs for texts.
_HINTS = dict.fromkeys(("/v1/responses", "/v1/messages"), f"This API is not offered. Send the messages to {_TEXTS}")

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
    reason = {404: "does not exist", 405: f"does not accept {request.method}"}.get(status, f"failed with {status}")
    hint = _HINTS.get(request.url.path, "Embeddings are at POST /v1/embeddings, texts at " + _TEXTS)
    refusal = (MethodNotAllowed if status == 405 else PathNotFound)(
        f"{request.method} {request.url.path}: this path {reason}. {hint}"
    )
    refusal.status = status
    return refuse(refusal, headers)


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
    return InternalError(f"ranklet failed unexpectedly. Look for {hint} in its log")
