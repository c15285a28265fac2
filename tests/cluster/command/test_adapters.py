"""What `ranklet adapters` prints and sends, against a service that answers with fixed cards."""

import json
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from ranklet.cluster.command import cli
from tests.http_server import http_server

LONG = "contracts-de-2026-final-v3-" + "x" * 120
REASON = "adapter 'broken' cannot be served:\n- adapter_model.safetensors: it is missing"
KEY = "rk-NOT-A-REAL-KEY"


def card(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "state": "registered", "revision": "9434bfbbd6dbfd75", "path": f"/adapters/{name}",
        "pinned": False, "rank": None, "target_modules": None, "bytes": None, "references": 0, "replicas": [],
        "error": None, **fields,
    }  # fmt: skip


CARDS = [
    card("legal[v2]"),
    card("[bold]x[/bold]"),
    card(":smile:"),
    card(LONG),
    card("broken", state="failed", error=REASON),
]


class FixedService:
    """Answers GET /v1/adapters and POST /v1/adapters, and keeps what it is sent."""

    url: str

    def __init__(self) -> None:
        sent = self.sent = list[tuple[str, str | None, Any]]()
        needs_key = self.needs_key = Event()

        class FixedAnswer(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                sent.append((self.path, self.headers.get("authorization"), json.loads(body or "null")))
                if needs_key.is_set() and self.headers.get("authorization") is None:
                    refusal = json.dumps({"error": {"message": "a key is needed"}}).encode()
                    self.send_response(401)
                    self.send_header("content-length", str(len(refusal)))
                    self.end_headers()
                    self.wfile.write(refusal)
                    return
                loaded = {"name": "x", "revision": "0", "rank": 1, "bytes": 1, "target_modules": ["q_proj"]}
                content = json.dumps({"data": CARDS} if self.command == "GET" else loaded).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.handler = FixedAnswer


@pytest.fixture
def fixed() -> Iterator[FixedService]:
    service = FixedService()
    with http_server(service.handler) as port:
        service.url = f"http://127.0.0.1:{port}"
        yield service


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_the_list_is_whole_at_every_width(
    columns: str, fixed: FixedService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["adapters", "list", "--url", fixed.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, each in zip(lines[1:], CARDS, strict=False):
        assert line.split()[:3] == [each["name"], each["state"], each["revision"]]
    assert lines[-2:] == f"broken: {REASON}".splitlines()


def test_the_list_as_json_has_all_that_the_service_says(
    fixed: FixedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["adapters", "list", "--json", "--url", fixed.url]) == 0
    assert json.loads(capsys.readouterr().out) == CARDS


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/"])
def test_the_url_of_an_openai_client_is_understood(end: str, fixed: FixedService) -> None:
    assert cli.main(["adapters", "list", "--url", fixed.url + end]) == 0
    assert fixed.sent[0][0] == "/v1/adapters"


def test_a_url_of_another_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapters", "list", "--url", "127.0.0.1:8000"]) == 1
    assert "such as http://127.0.0.1:8000" in capsys.readouterr().err


@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", "{}"])
def test_a_key_is_sent_without_its_line_end(around: str, fixed: FixedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLET_API_KEY", around.format(KEY))
    assert cli.main(["adapters", "list", "--url", fixed.url]) == 0
    assert fixed.sent[0][1] == f"Bearer {KEY}"


def test_a_service_that_needs_a_key_says_where_to_put_it(
    fixed: FixedService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANKLET_API_KEY", raising=False)
    fixed.needs_key.set()
    assert cli.main(["adapters", "list", "--url", fixed.url]) == 1
    assert capsys.readouterr().err == "ranklet: a key is needed; then set RANKLET_API_KEY or --key\n"


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"{KEY}\x00", f"{KEY} x", f"\u201c{KEY}\u201d", f"{KEY}\r\nx-admin: 1"])
@pytest.mark.parametrize("action", ["list", "show a", "load a", "unload a"])
def test_a_key_that_cannot_be_sent_is_refused_and_never_shown(
    key: str, action: str, fixed: FixedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["adapters", *shlex.split(action), "--url", fixed.url, "--key", key]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("ranklet: API key: expected")
    assert KEY not in output.out + output.err
    assert fixed.sent == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[::1", "http://127.0.0.1:99999", "http://\u00e4 b"])
def test_a_service_that_does_not_answer_is_named_without_the_key(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapters", "list", "--url", url, "--key", KEY]) == 1
    output = capsys.readouterr()
    assert f"--url {url}: expected a service that answers" in output.err
    assert KEY not in output.out + output.err


def test_a_relative_path_starts_in_the_current_folder_if_it_leads_to_one(
    fixed: FixedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("here", "./here", "elsewhere", "s3://bucket/a"):
        assert cli.main(["adapters", "load", "x", "--path", path, "--url", fixed.url]) == 0
    here = str(tmp_path / "here")
    assert [body["path"] for _, _, body in fixed.sent] == [here, here, "elsewhere", "s3://bucket/a"]
