"""Requests of the command line to servers that answer, refuse, or do not speak HTTP."""

import contextlib
import json
import socket
import threading
import urllib.error
from collections.abc import Iterator

import pytest

from ranklet.cluster.command import cli
from ranklet.cluster.command.json_client import fetch_json

OK = b'HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{"a":1}'
CUT_OFF = b"HTTP/1.1 200 OK\r\ncontent-length: 70\r\n\r\n{"


@contextlib.contextmanager
def answering(raw: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the URL of a server that answers one request with `raw`, and the requests it received."""
    received: list[bytes] = []

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            received.append(connection.recv(65_536))
            connection.sendall(raw)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", received
        thread.join()


def test_a_request_carries_its_token_and_ignores_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering(OK) as (url, received):
        assert fetch_json(f"{url}/x", timeout_s=30, token="secret", method="DELETE") == {"a": 1}
    assert received[0].startswith(b"DELETE /x HTTP/1.1\r\n")
    assert b"\r\nauthorization: bearer secret\r\n" in received[0].lower()


@pytest.mark.parametrize("raw", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", CUT_OFF])
def test_an_answer_that_is_not_complete_http_is_an_os_error(raw: bytes) -> None:
    with answering(raw) as (url, _), pytest.raises(OSError):  # noqa: PT011 (the texts are those of the system)
        fetch_json(url, timeout_s=30)


def test_an_error_status_raises_with_its_body() -> None:
    body = json.dumps({"error": {"message": "no"}}).encode()
    raw = b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    with answering(raw) as (url, _), pytest.raises(urllib.error.HTTPError) as error:
        fetch_json(url, timeout_s=30)
    with error.value as response:
        assert json.load(response)["error"]["message"] == "no"


def test_the_command_reports_a_server_that_does_not_speak_http(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"SSH-2.0-OpenSSH_9.2\r\n") as (url, _):
        assert cli.main(["adapters", "list", "--url", url]) == 1
    assert f"ranklet: --url {url}: expected a service that answers" in capsys.readouterr().err
