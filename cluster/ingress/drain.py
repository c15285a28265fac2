"""Lets the requests in flight end when the cluster stops, while new ones are refused."""

import contextlib
import os
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from ranklet.cluster.datapath import DRAIN_IS_OVER, DRAIN_VARIABLE
from ranklet.cluster.ingress.refusals import refuse
from ranklet.replicas.errors import Unavailable

_RETRY_AFTER_S = 5.0


class Drain:
    """Counts the requests of one gateway until the last byte of each answer.

    Args:
        file: new requests are refused while it exists. None is the file that the environment names, if it names one.
    """

    def __init__(self, file: Path | None = None) -> None:
        name = os.environ.get(DRAIN_VARIABLE)
        self._file = file or (Path(name) if name else None)
        self.in_flight = 0

    @property
    def is_on(self) -> bool:
        return self._file is not None and self._file.exists()

    @property
    def is_over(self) -> bool:
        """Whether the time for the requests in flight is over."""
        with contextlib.suppress(OSError):
            return self._file is not None and self._file.read_text(encoding="utf-8") == DRAIN_IS_OVER
        return False


class DrainMiddleware:
    """Refuses new requests during a drain. Reading calls, such as probes, are answered and not counted."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if self._drain.is_on:
            error = Unavailable("the service is stopping and accepts no requests", retry_after_s=_RETRY_AFTER_S)
            await refuse(error, {"connection": "close"})(scope, receive, send)
            return
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1
