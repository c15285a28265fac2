"""Web pages of others cannot use a service through the browser of someone who can reach it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from unittest.mock import create_autospec

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.page import page_response
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.routes import build_app
from ranklet.cluster.ingress.tokenize import TokenizeApi
from tests.cluster.ingress.browser import browser
from tests.needs import needs

CHANGES = (
    ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("POST", "/unload_lora_adapter"),
)  # fmt: skip
JSON = {"content-type": "application/json"}


class App:
    """A gateway's app whose handlers only record that they were reached."""

    def __init__(self, host_names: Sequence[str] | None = None) -> None:
        self.reached: list[str] = []
        admin, probes = create_autospec(AdminApi), create_autospec(ProbesApi)
        admin.load_adapter = admin.unload_adapter = admin.delete_adapter = admin.get_status = self._record
        probes.page = self._page
        self.app = build_app(
            inference={}, tokens=create_autospec(TokenizeApi), models=create_autospec(ModelsApi), admin=admin,
            probes=probes, drain=Drain(), host_names=host_names,
        )  # fmt: skip

    async def ask(self, method: str, path: str, headers: Mapping[str, str], host: str = "localhost") -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers={**headers, "host": host}, content=b"{}")

    async def _record(self, request: Request) -> Response:
        self.reached.append(f"{request.method} {request.url.path}")
        return JSONResponse({"error": {"message": "recorded"}}, 418)

    async def _page(self, request: Request) -> Response:
        return page_response()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an app on a free port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_a_page_of_another_origin_changes_no_adapter(method: str, path: str) -> None:
    app = App()
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:8001"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = await app.ask(method, path, {**JSON, **headers}, "localhost:8000")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_page"), headers
    assert app.reached == []


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_other_clients_and_pages_of_its_own_may(method: str, path: str) -> None:
    app = App()
    for headers in (
        {},
        {"origin": "http://LOCALHOST:8000"},
        {"origin": "https://public.example", "sec-fetch-site": "same-origin"},  # a proxy has changed `Host`
        {"sec-fetch-site": "none"},
        {"content-type": "Application/JSON; charset=utf-8"},
    ):
        assert (await app.ask(method, path, {**JSON, **headers}, "localhost:8000")).status_code == 418, headers
    assert app.reached == [f"{method} {path}"] * 5


@pytest.mark.parametrize(("method", "path"), [each for each in CHANGES if each[0] == "POST"])
async def test_bodies_are_declared_as_json(method: str, path: str) -> None:
    """Browsers send the other types for pages of any origin, without asking first."""
    app = App()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = await app.ask(method, path, {"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type"), kind
    assert app.reached == []


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:80", "[::1]:8000", "10.0.0.7", "my.example:1", ""]
)
async def test_a_service_on_loopback_answers_to_its_own_names(host: str) -> None:
    app = App(["My.Example"])
    assert (await app.ask("GET", "/v1/status", {}, host)).status_code == 418


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "localhost@evil.example",
     "127.0.0.1:80@evil.example", "xmy.example", "[", ":8000"],
)  # fmt: skip
async def test_a_service_on_loopback_refuses_names_of_others(host: str) -> None:
    """The page of a name that leads to 127.0.0.1 for a while could read all answers."""
    app = App(["my.example"])
    for method, path in (*CHANGES, ("GET", "/v1/status"), ("GET", "/"), ("GET", "/nowhere")):
        answer = await app.ask(method, path, JSON, host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")
    assert app.reached == []
    assert (await App().ask("GET", "/v1/status", {}, host)).status_code == 418, "HTTP is not on loopback only"


def test_the_page_names_its_protections() -> None:
    headers = page_response().headers
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", policy["script-src"])
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


TRY = """
const kinds = ["text/plain", "application/x-www-form-urlencoded", "application/json"];
const send = (path, kind) =>
  fetch("http://%s" + path, {method: "POST", mode: "no-cors", headers: {"content-type": kind}, body: "{}"});
Promise.allSettled(kinds.flatMap(kind => %s.map(path => send(path, kind)))).then(all => all.length)
"""
PLANT = """
const made = document.createElement("script");
made.textContent = "window.planted = 1";
document.body.append(made);
typeof planted
"""


@needs("chromium")
def test_a_browser_keeps_a_page_of_another_origin_out(tmp_path: Path) -> None:
    app = App()
    with serving(app.app) as address:

        async def frame(request: Request) -> Response:
            return HTMLResponse(f'<iframe src="http://{address}/"></iframe>')

        paths = [path for method, path in CHANGES if method == "POST"]
        with (
            serving(Starlette(routes=[Route("/", frame)])) as foreign,
            browser(f"http://{foreign}/".replace("127.0.0.1", "localhost"), tmp_path) as page,
        ):
            assert page.run(TRY % (address, paths)) == 15
            assert app.reached == [], "neither a change nor, from the page in a frame, a refresh"
            page.call("Page.navigate", url=f"http://{address}/")
            page.wait_for("document.getElementById('message')?.textContent === 'recorded'")  # its own script runs
            assert set(app.reached) == {"GET /v1/status"}
            assert page.run(PLANT) == "undefined", "no other script runs"
            assert page.run("getComputedStyle(document.body).margin") != "8px", "its own style applies"
