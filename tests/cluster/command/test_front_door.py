"""A real HAProxy with Ray's own configuration, started by the program that `ranklet up` gives to Ray."""

import contextlib
import http.server
import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ranklet.cluster.command.front_door import PER_SOURCE_VARIABLE, Limits, limited, make_private
from ranklet.cluster.command.haproxy import PROGRAM_VARIABLE, write_haproxy
from ranklet.cluster.command.ports import free_ports
from ranklet.cluster.datapath import CLIENT_HEADER
from tests.cluster.service import eventually
from tests.http_server import http_server
from tests.needs import needs
from tests.ray_internals import write_haproxy_configuration

pytestmark = needs("haproxy")
HALF_OPEN = 4300
PER_SOURCE = 20
QUIET_S = 2.5
HALF_REQUEST = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
NAMED_GATEWAY = """
import http.server, os, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.endswith("/last"):
            self.server.shutdown()
            self.server.server_close()
        if self.path.endswith(("/held", "/last")):
            os.write(1, b"taken\\n")
            os.read(0, 1)
        said = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_POST = do_GET

http.server.ThreadingHTTPServer.request_queue_size = 100  # connections that a stopped process still gets
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
threading.Event().wait()
"""
SHORT = {"RANKLET_HEADER_TIMEOUT_S": "1", "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "1"}


class QuietGateway(http.server.BaseHTTPRequestHandler):
    """Answers GET with the client's address. Answers POST with a stream that pauses before each of its two parts."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        client = self.headers.get(CLIENT_HEADER, "").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(client)))
        self.end_headers()
        self.wfile.write(client)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(QUIET_S)
        with contextlib.suppress(OSError):  # HAProxy left
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for part in (b"5\r\nfirst\r\n", b"6\r\nsecond\r\n0\r\n\r\n"):
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(QUIET_S)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@dataclass
class FrontDoor:
    """A running HAProxy."""

    port: int
    metrics: int
    folder: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(source, 0))

    def status(self, path: str, source: str = "127.0.0.1") -> int | None:
        """Ask on a new connection. Returns None if HAProxy closes it without an answer."""
        with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=60) as client:
            try:
                return client.get(self.url + path).status_code
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                return None


@contextmanager
def front_door(
    folder: Path, gateways: Mapping[str, Sequence[int]], environment: Mapping[str, str] | None = None
) -> Iterator[FrontDoor]:
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    http_port, metrics, statistics = free_ports(3)
    configuration = write_haproxy_configuration(folder, (http_port, metrics, statistics), gateways)
    assert write_haproxy(folder / "haproxy")
    command = [str(folder / "haproxy"), "-db", "-f", str(configuration)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=log, stderr=log)
    door = FrontDoor(http_port, metrics, folder, process)
    try:
        eventually("HAProxy answers", lambda: _answers(door, folder / "log"), poll_s=0.05)
        yield door
    finally:
        process.kill()
        process.wait()


def _answers(door: FrontDoor, log: Path) -> bool:
    assert door.process.poll() is None, log.read_text()
    return door.status("/-/routes") is not None


@contextmanager
def named_gateway() -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A gateway in its own process, which answers with the id of this process.

    For each request of `/held` it writes a line, and answers once it reads a byte. After `/last`, which is answered so
    too, it refuses connections.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-c", NAMED_GATEWAY, str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, port
        finally:
            process.kill()


@pytest.fixture(scope="module")
def gateway() -> Iterator[int]:
    with http_server(QuietGateway) as port:
        yield port


@pytest.fixture(scope="module")
def door(gateway: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """A HAProxy with the limits that it has in production."""
    with front_door(tmp_path_factory.mktemp("door"), {"/": [gateway]}) as started:
        eventually("the gateway is up", lambda: started.status("/health") == 200)
        yield started


@pytest.fixture(scope="module")
def strict(gateway: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """A HAProxy with short timeouts, and one application that has no gateway."""
    (nobody,) = free_ports(1)
    with front_door(tmp_path_factory.mktemp("strict"), {"/v1": [gateway], "/lost": [nobody]}, SHORT) as started:
        yield started


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()["error"]["code"], answer.headers.get("retry-after")


def test_a_haproxy_that_knows_no_application_asks_to_come_back(tmp_path: Path) -> None:
    """So it is for a moment after a new start."""
    with front_door(tmp_path / "empty", {}) as empty:
        answer = httpx.post(f"{empty.url}/v1/embeddings", json={"input": "a text"})
    assert error_of(answer) == (503, "unavailable", "1")
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_errors_of_haproxy_have_the_form_of_the_gateways(strict: FrontDoor) -> None:
    assert error_of(httpx.get(f"{strict.url}/lost/path")) == (503, "unavailable", "1")
    assert error_of(httpx.get(f"{strict.url}/nowhere")) == (404, "not_found", None)


def test_a_header_that_does_not_end_is_refused(strict: FrontDoor) -> None:
    with strict.connect() as slow:
        slow.sendall(HALF_REQUEST)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        assert slow.recv(4096) == b""


def test_a_stream_may_be_quiet_for_longer_than_the_clients_timeout(strict: FrontDoor) -> None:
    assert float(SHORT["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) < QUIET_S
    assert httpx.post(f"{strict.url}/v1/completions", json={}, timeout=60).text == "firstsecond"


def test_a_gateway_that_gives_no_answer_in_time_is_504(gateway: int, tmp_path: Path) -> None:
    with front_door(tmp_path / "short", {"/": [gateway]}, {"RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "1"}) as short:
        answer = httpx.post(f"{short.url}/v1/completions", json={}, timeout=60)
    assert error_of(answer) == (504, "unavailable", "1")


def test_one_address_cannot_hold_all_connections(gateway: int, tmp_path: Path) -> None:
    with front_door(tmp_path / "few", {"/": [gateway]}, {PER_SOURCE_VARIABLE: str(PER_SOURCE)}) as few:
        eventually("the gateway is up", lambda: few.status("/health") == 200)
        with ExitStack() as held:
            for _ in range(PER_SOURCE):
                held.enter_context(few.connect())
            assert few.status("/health") is None
            assert few.status("/health", source="127.0.0.2") == 200
        eventually("the address may connect again", lambda: few.status("/health") == 200)


def test_a_gateway_learns_the_address_of_the_client_and_not_what_it_claims(door: FrontDoor) -> None:
    for source in ("127.0.0.1", "127.0.0.2"):
        with httpx.Client(transport=httpx.HTTPTransport(local_address=source)) as client:
            for claimed in ({}, {CLIENT_HEADER: "192.0.2.1"}):
                assert client.get(f"{door.url}/health", headers=claimed).text == source


def test_half_open_connections_do_not_stop_the_service(door: FrontDoor) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = Limits.of({}, before[1]).connections_per_source
    if connections <= HALF_OPEN:
        pytest.skip(f"needs {2 * HALF_OPEN} connections (ulimit -Hn 20000)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        with ExitStack() as held:
            for _ in range(HALF_OPEN):
                held.enter_context(door.connect()).sendall(HALF_REQUEST)
            assert door.status("/health") == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_other_users_reach_neither_the_socket_nor_the_files(door: FrontDoor) -> None:
    assert stat.S_IMODE(door.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((door.folder / "admin.sock").stat().st_mode) == 0o600


def test_metrics_listen_where_http_does(door: FrontDoor) -> None:
    assert "haproxy_process" in httpx.get(f"http://127.0.0.1:{door.metrics}/metrics").text
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", door.metrics), timeout=60)


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder = tmp_path / "haproxy" / "node"
    folder.mkdir(parents=True)
    os.chown(folder.parent, 65534, 65534)
    with pytest.raises(PermissionError, match="RAY_SERVE_HAPROXY_SOCKET_PATH"):
        make_private(folder)


def test_limits_are_applied_once(tmp_path: Path) -> None:
    """Ray writes the file again before each start. Nothing depends on that."""
    ray = write_haproxy_configuration(tmp_path, (1, 2, 3), {"/": [4]}).read_text()
    limits = Limits.of({}, 20000)
    once = limited(ray, limits)
    assert limited(once, limits) == once != ray
    assert "splice" not in once
    assert "    hard-stop-after 3600s\n" in once


def test_a_haproxy_without_lua_starts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tmp_path / "without-lua"
    without.write_text('#!/bin/sh\n[ "$1" = -vv ] && echo "Feature list : +EPOLL -LUA" || cat "$2"\n')
    without.chmod(0o755)
    monkeypatch.setenv(PROGRAM_VARIABLE, str(without))
    configuration = write_haproxy_configuration(tmp_path, (1, 2, 3), {"/": [4]})
    assert write_haproxy(tmp_path / "program")
    command = [str(tmp_path / "program"), "-f", str(configuration)]
    started_with = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "lua-load" not in started_with
    assert "    default-server on-marked-down shutdown-sessions\n" in started_with


def test_an_unknown_configuration_does_not_start(tmp_path: Path) -> None:
    assert write_haproxy(tmp_path / "haproxy")
    (tmp_path / "haproxy.cfg").write_text("global\n    maxconn 4096\n")
    command = [str(tmp_path / "haproxy"), "-c", "-f", str(tmp_path / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "frontend http_frontend" in done.stderr
