"""HAProxy lets streams end when a gateway drains, and when a new HAProxy takes over."""

import contextlib
import http.server
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.command.test_front_door import FrontDoor, front_door
from tests.cluster.service import eventually
from tests.http_server import http_server
from tests.needs import needs

pytestmark = needs("haproxy")
DRAINS, GO_ON = threading.Event(), threading.Event()
LIMIT = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"


class DrainedGateway(http.server.BaseHTTPRequestHandler):
    """Refuses health checks once it drains, as Serve does. Streams two parts, the second one when `GO_ON` is set."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(503 if DRAINS.is_set() else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        GO_ON.wait(60)
        with contextlib.suppress(OSError):  # in the test that cuts the stream
            self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[int]:
    """Yield the port of a gateway that does not drain yet."""
    DRAINS.clear()
    GO_ON.clear()
    with http_server(DrainedGateway) as port:
        yield port
        GO_ON.set()


@contextlib.contextmanager
def stream(door: FrontDoor) -> Iterator[Iterator[bytes]]:
    """Yield the rest of a stream whose first part has come."""
    eventually("the gateway is up", lambda: door.status("/health") == 200, poll_s=0.05)
    with httpx.stream("POST", f"{door.url}/v1/completions", json={}, timeout=30) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"first"
        yield parts


def test_a_stream_of_a_gateway_that_drains_goes_on(gateway: int, tmp_path: Path) -> None:
    """HAProxy sends the gateway no new requests."""
    with front_door(tmp_path / "door", {"/": [gateway]}) as door, stream(door) as rest:
        DRAINS.set()
        eventually(
            "HAProxy answers new requests itself",
            lambda: "No gateway is available" in httpx.get(f"{door.url}/health", timeout=30).text,
        )
        GO_ON.set()
        assert b"".join(rest) == b"second"


def test_a_haproxy_that_was_replaced_ends_with_its_last_stream(gateway: int, tmp_path: Path) -> None:
    with front_door(tmp_path / "door", {"/": [gateway]}) as door:
        with stream(door) as rest:
            door.process.send_signal(signal.SIGUSR1)
            eventually("it takes no connections", lambda: door.status("/health") is None, poll_s=0.05)
            GO_ON.set()
            assert b"".join(rest) == b"second"
        assert door.process.wait(60) == 0


def test_a_haproxy_that_was_replaced_cuts_its_streams_at_the_limit(gateway: int, tmp_path: Path) -> None:
    with front_door(tmp_path / "door", {"/": [gateway]}, {LIMIT: "1"}) as door, stream(door) as rest:
        door.process.send_signal(signal.SIGUSR1)
        began_s = time.monotonic()
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(rest)
        assert 0.5 < time.monotonic() - began_s < 30
