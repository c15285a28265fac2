"""What a service says does not control the terminal of the person who asks."""

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from rich.console import Console

from ranklet.cluster.command.cli import main
from ranklet.cluster.command.console import plain
from tests.http_server import http_server

SENT, SHOWN = "\x1b[0m\x9b2J\u202e", r"\x1b[0m\x9b2J\u202e"


class _Evil(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        card = {
            "name": SENT, "state": SENT, "revision": SENT, "rank": 1, "bytes": 1, "references": 0, "replicas": [],
            "pinned": False,
        }  # fmt: skip
        self._answer(200, {"data": [card]})

    def do_DELETE(self) -> None:
        self._answer(404, {"error": {"message": SENT}})

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http_server(_Evil) as port:
        yield f"http://127.0.0.1:{port}"


def test_names_and_messages_of_a_service_are_escaped(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--url", url]) == 0
    assert main(["adapters", "unload", "x", "--url", url]) == 1
    shown = capsys.readouterr()
    assert shown.out.count(SHOWN) == 3
    assert SHOWN in shown.err
    assert all(each.isprintable() or each == "\n" for each in shown.out + shown.err)


def test_markup_is_shown_as_it_is() -> None:
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=80).print(plain("[bold]name[/bold]\x1b[0m"))
    assert "[bold]name[/bold]\\x1b[0m" in file.getvalue()
