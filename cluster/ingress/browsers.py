"""Keeps web pages of other origins from using this service through the browser of someone who can reach it.

A page may send requests to any address that its visitor's browser can reach, such as 127.0.0.1, though it cannot read
the answers. It can read them if its own host name leads to that address for a while (DNS rebinding); then the browser
sends that name in `Host`.
"""

import ipaddress
import urllib.parse
from collections.abc import Awaitable, Callable, Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ranklet.cluster.ingress.refusals import refuse
from ranklet.replicas.errors import RankletError

_OWN_SITES = ("same-origin", "none")  # none: the user typed the address
_JSON = "application/json"
_Handler = Callable[[Request], Awaitable[Response]]


class ForeignPage(RankletError):  # noqa: N818  # named like its siblings in replicas/errors.py
    """A page of another origin sent a request that changes something."""

    code, status = "foreign_page", 403


class ForeignHost(RankletError):  # noqa: N818
    """The request was sent to a host name that is not this service's."""

    code, status = "foreign_host", 403


class WrongContentType(RankletError):  # noqa: N818
    """The body is not declared as JSON. Browsers ask this service before pages of other origins may send JSON."""

    code, status = "unsupported_media_type", 415


def for_own_pages(handler: _Handler) -> _Handler:
    """Return a handler that refuses what pages of other origins can make browsers send."""

    async def checked(request: Request) -> Response:
        check_page(request.headers)
        if request.method == "POST":
            check_content_type(request.headers)
        return await handler(request)

    return checked


def check_page(headers: Headers) -> None:
    """Raise ForeignPage if a page of another origin sent the request. Other clients than browsers send no origin."""
    sites = headers.getlist("sec-fetch-site")
    own = headers.get("host", "").lower()
    # A proxy may have changed `Host`, which the origin is compared with. Sec-Fetch-Site needs no comparison.
    origins = [] if sites else headers.getlist("origin")
    foreign = [site for site in sites if site not in _OWN_SITES]
    foreign += [origin for origin in origins if origin.lower().partition("://")[2] != own]
    if foreign:
        raise ForeignPage(
            f"expected a request from no other web page than this service's own, got one from {foreign[0]!r}. Send it "
            "from a program"
        )


def check_content_type(headers: Headers) -> None:
    """Raise WrongContentType unless the body is declared as JSON."""
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != _JSON:
        raise WrongContentType(f"content-type: expected {_JSON}, got {given[:100] or 'none'!r}", param="content-type")


class HostCheck:
    """ASGI middleware that refuses requests to host names of others. IP addresses and localhost pass.

    Args:
        names: host names of this service.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        foreign = next((host for host in hosts if not self._is_own(host)), None)
        if foreign is None:
            await self._app(scope, receive, send)
            return
        refusal = ForeignHost(
            "host: expected an IP address, localhost or a name in security.host_names, because HTTP listens on "
            f"loopback only; got {foreign[:100]!r}",
            param="host",
        )
        await refuse(refusal)(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return not host  # HTTP/1.0, which browsers do not send
        return True
