"""HAProxy lets the streams of a gateway end that drains, and sends it no new requests."""

import http.server
import threading
from pathlib import Path

import httpx

from tests.cluster.command.test_front_door import front_door
from tests.cluster.service import eventually
from tests.needs import needs

pytestmark = needs("haproxy")
DRAINS, GO_ON = threading.Event(), threading.Event()


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
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_stream_of_a_gateway_that_drains_goes_on(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DrainedGateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with front_door(tmp_path / "door", {"/": [server.server_port]}) as door:
            eventually("the gateway is up", lambda: door.status("/health") == 200)
            with httpx.stream("POST", f"{door.url}/v1/completions", json={}, timeout=30) as answer:
                parts = answer.iter_raw()
                assert next(parts) == b"first"
                DRAINS.set()
                eventually(
                    "HAProxy answers new requests itself",
                    lambda: "No gateway is available" in httpx.get(f"{door.url}/health", timeout=30).text,
                )
                GO_ON.set()
                assert b"".join(parts) == b"second"
    finally:
        GO_ON.set()
        server.shutdown()
        thread.join()
        server.server_close()
