"""The wait for requests in flight before a stop."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from ranklet.cluster.command.drain import wait_for_requests
from tests.http_server import http_server


@contextmanager
def gateway(counts: list[int | None]) -> Iterator[str]:
    """Yield the URL of a server whose GET /ready counts down through `counts`; None is an answer without a count."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count = counts.pop(0) if len(counts) > 1 else counts[0]
            content = json.dumps({} if count is None else {"status": "stopping", "in_flight": count}).encode()
            self.send_response(503)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http_server(Ready) as port:
        yield f"http://127.0.0.1:{port}"


def waited(counts: list[int | None], timeout_s: float, *, runs: bool = True) -> tuple[float, list[str]]:
    lines: list[str] = []
    begin_s = time.monotonic()
    with gateway(counts) as url:
        wait_for_requests(url, timeout_s, lines.append, lambda: runs)
    return time.monotonic() - begin_s, lines


def test_the_last_request_ends_the_wait() -> None:
    counts: list[int | None] = [2, None, 1, 0]
    _, lines = waited(counts, 60)
    assert counts == [0]
    assert lines == ["waiting up to 60 s for 2 requests in flight; a signal ends them at once"]


def test_a_request_that_does_not_end_is_given_up() -> None:
    took_s, lines = waited([1], 0.5)
    assert took_s >= 0.5
    assert lines[-1] == "1 requests did not end within 0.5 s (graceful_shutdown_timeout_s)"


def test_nobody_is_waited_for_where_no_gateway_answers_or_the_cluster_has_ended() -> None:
    assert waited([None], 60)[0] < 30
    counts: list[int | None] = [1]
    assert waited(counts, 60, runs=False)[1] == []
