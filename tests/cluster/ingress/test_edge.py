"""Forms of HTTP requests: methods, slashes, other origins, compressed bodies, and what refusals name."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ranklet.cluster.config import LimitsConfig, SecurityConfig
from ranklet.cluster.ingress.admin import AdminApi
from ranklet.cluster.ingress.drain import Drain
from ranklet.cluster.ingress.exchange import Exchange
from ranklet.cluster.ingress.models import ModelsApi
from ranklet.cluster.ingress.probes import ProbesApi
from ranklet.cluster.ingress.routes import build_app
from ranklet.cluster.ingress.tokenize import TokenizeApi
from tests.cluster.ingress.parts import BASE, Parts

ORIGIN = "https://app.example.com"
BODY = json.dumps({"model": BASE, "input": "one two"}).encode()
LIMIT = 10_000


def client(folder: Path, *origins: str) -> httpx.AsyncClient:
    """Return a client of a gateway's routes."""
    parts = Parts(folder, LimitsConfig(max_body_bytes=LIMIT))

    async def embeddings(request: Request) -> Response:
        return await Exchange(parts.services, parts.parse, request).answer()

    async def no_gateways() -> list[Any]:
        return []

    async def none_in_flight() -> int:
        return 0

    drain = Drain()
    app = build_app(
        inference={"/v1/embeddings": embeddings},
        tokens=create_autospec(TokenizeApi),
        models=create_autospec(ModelsApi),
        admin=create_autospec(AdminApi),
        probes=ProbesApi(parts.services.replicas, no_gateways, drain, none_in_flight),
        drain=drain,
        origins=origins,
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=60)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/openapi.json", "/"])
async def test_a_path_that_answers_get_answers_head(tmp_path: Path, path: str) -> None:
    http = client(tmp_path)
    got, head = await http.get(path), await http.head(path)
    assert got.status_code == head.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("path", ["/v1/embeddings/", "//v1/embeddings", "/v1//embeddings//"])
async def test_more_slashes_change_nothing(tmp_path: Path, path: str) -> None:
    answer = await client(tmp_path).post(f"http://gateway{path}", content=BODY)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/metrics", "/metrics/targets"),
        ("/v1/v1/adapters", "base URL"),
        ("/embeddings", "POST /v1/embeddings"),
        ("/v1/embed", "POST /v1/embeddings"),
        ("/v1/rerank", "not offered"),
        ("/chat/completions", "POST /v1/chat/completions"),
        ("/generate", "POST /v1/completions"),
        ("/v1/responses", "POST /v1/chat/completions"),
        ("/models", "GET /v1/models"),
        ("/v1/lora/load", "POST /v1/load_lora_adapter"),
        ("/healthz", "GET /health"),
        ("/docs", "GET /openapi.json"),
        ("/nothing", "POST /v1/embeddings, texts at POST /v1/chat/completions"),
    ],
)
async def test_an_unknown_path_is_refused_with_the_one_that_was_meant(tmp_path: Path, path: str, hint: str) -> None:
    http = client(tmp_path)
    for method in ("GET", "POST"):
        status, code, message = error_of(await http.request(method, path))
        assert (status, code) == (404, "not_found")
        assert message.startswith(f"{method} {path}: this path does not exist. ")
        assert hint in message


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/embeddings", "POST"), ("PUT", "/v1/adapters", "GET, HEAD, POST"), ("POST", "/health", "GET, HEAD")],
)
async def test_a_wrong_method_is_refused_with_those_that_are_right(
    tmp_path: Path, method: str, path: str, allowed: str
) -> None:
    answer = await client(tmp_path).request(method, path)
    status, code, message = error_of(answer)
    assert (status, code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    assert f"Use {' or '.join(allowed.split(', '))}" in message


def preflight(origin: str) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }


async def test_pages_of_an_allowed_origin_may_use_the_api(tmp_path: Path) -> None:
    http = client(tmp_path, ORIGIN, "http://localhost:3000")
    allowed = await http.options("/v1/embeddings", headers=preflight(ORIGIN))
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    for given, status in ((BODY, 200), (b"{", 400)):
        answer = await http.post("/v1/embeddings", content=given, headers={"origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-origin" not in (await http.post("/v1/embeddings", content=BODY)).headers


@pytest.mark.parametrize("origins", [(), ("https://other.example.com",), (f"{ORIGIN}:8443",)])
async def test_other_origins_get_no_permission(tmp_path: Path, origins: tuple[str, ...]) -> None:
    http = client(tmp_path, *origins)
    refused = await http.options("/v1/embeddings", headers=preflight(ORIGIN))
    assert error_of(refused)[0] == 405
    assert "security.allowed_origins" in error_of(refused)[2]
    answer = await http.post("/v1/embeddings", content=BODY, headers={"origin": ORIGIN})
    assert answer.status_code == 200
    for each in (refused, answer):
        assert not [name for name in each.headers if name.startswith("access-control-")]


async def test_any_origin_may_be_allowed(tmp_path: Path) -> None:
    answer = await client(tmp_path, "*").post("/v1/embeddings", content=BODY, headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example.com", f"{ORIGIN}/", f"{ORIGIN}/path", "https://*.example.com", ""])
def test_a_setting_that_no_browser_sends_as_its_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="expected origins such as"):
        SecurityConfig(allowed_origins=(origin,))


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
        ("", b"\xef\xbb\xbf" + BODY),
    ],
)
async def test_compressed_bodies_are_inflated(tmp_path: Path, encoding: str, body: bytes) -> None:
    answer = await client(tmp_path).post("/v1/embeddings", content=body, headers={"content-encoding": encoding})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("encoding", "body", "status", "says"),
    [
        ("br", BODY, 415, "Content-Encoding: expected gzip, deflate or none, got 'br'"),
        ("gzip, gzip", gzip.compress(BODY, mtime=0), 415, "got 'gzip, gzip'"),
        ("gzip", BODY, 400, "expected one whole gzip stream"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400, "got: a part of it"),
        ("gzip", gzip.compress(BODY, mtime=0) * 2, 400, "more data after its end"),
        ("gzip", b"", 400, "a part of it"),
        ("gzip", gzip.compress(b" " * (LIMIT + 1), mtime=0), 413, "after it is inflated"),
        ("deflate", zlib.compress(b" " * 100_000_000), 413, f"at most {LIMIT} bytes"),
        ("gzip", gzip.compress(BODY + b"x", mtime=0), 400, "expected JSON"),
        ("", gzip.compress(BODY, mtime=0), 400, "Set the header Content-Encoding: gzip"),
    ],
)
async def test_other_compressed_bodies_are_refused_with_the_reason(
    tmp_path: Path, encoding: str, body: bytes, status: int, says: str
) -> None:
    answer = await client(tmp_path).post("/v1/embeddings", content=body, headers={"content-encoding": encoding})
    assert error_of(answer)[0] == status
    assert says in error_of(answer)[2]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "an empty body"),
        (b" \n", "an empty body"),
        (b"model=base&input=a", "a form"),
        (b"--x\r\nContent-Disposition: form-data", "a form"),
        (b"{'model': 'base'}", "single quotes"),
        (BODY.decode().encode("utf-16"), "UTF-16"),
        (b'{"input": "\xff"}', "not UTF-8, at byte 11"),
        (b'{"input": NaN}', "line 1 column 11"),
    ],
)
async def test_a_body_that_is_not_json_is_refused_with_what_it_is(tmp_path: Path, body: bytes, says: str) -> None:
    status, _, message = error_of(await client(tmp_path).post("/v1/embeddings", content=body))
    assert status == 400
    assert message.startswith("body: expected JSON, got ")
    assert says in message
