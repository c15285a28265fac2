"""What a gateway does with requests before their path is looked up: forms of a path, and requests of other origins."""

import re
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ranklet.cluster.ingress.known_fields import IGNORED_HEADER

_MAX_AGE_S = 600
_METHODS: Final = ("GET", "HEAD", "POST", "DELETE")
_EXPOSED: Final = (
    "x-request-id", "retry-after", IGNORED_HEADER, "x-ranklet-replica", "x-ranklet-revision", "x-ranklet-tier",
    "x-ranklet-backend",
)  # fmt: skip
_SLASHES = re.compile("//+")


class PlainPaths:
    """Answers a path with a slash at its end, or with several slashes in a row, as the path without them.

    A redirect instead would name the wrong scheme behind a proxy that ends TLS, and many clients follow none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith("/") or "//" in path:
            scope["path"] = _SLASHES.sub("/", path).rstrip("/") or "/"
        await self._app(scope, receive, send)


class OtherOrigins:
    """Lets pages of the allowed origins use the API. Answers to other origins have no header of CORS, as without it.

    Args:
        origins: such as https://app.example.com; `*` allows any.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._any = "*" in self._origins
        self._cors = CORSMiddleware(
            app, allow_origins=sorted(self._origins), allow_methods=_METHODS, allow_headers=["*"],
            expose_headers=_EXPOSED, max_age=_MAX_AGE_S,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        allowed = origin is not None and (self._any or origin in self._origins)
        await (self._cors if allowed else self._app)(scope, receive, send)
