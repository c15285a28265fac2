"""Bytes that reach the HTTP port smuggle no request and get no 500, and valid requests are answered.

Valid and malformed requests follow each other on connections that send them in pieces.
"""

import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.cluster.others import Others, memory
from tests.cluster.service import Service, eventually

CONNECTIONS = 24
EXAMPLES = 6
SLOWEST_S = 20.0  # on a busy machine
QUIET_S = 0.5  # without an answer to what is malformed, or whose rest is awaited
BODY = b'{"model": "legal-v2", "input": "a"}'
HIDDEN = b"GET /v1/smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@dataclass(frozen=True)
class Piece:
    """One request on a connection.

    Attributes:
        status: of its answer; None if it is malformed.
    """

    content: bytes
    status: int | None = None


def length(body: bytes, change: int = 0) -> bytes:
    return b"Content-Length: %d" % (len(body) + change)


def post(body: bytes, *headers: bytes, line: bytes = b"POST /v1/embeddings HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: 127.0.0.1", b"Content-Type: application/json", *headers, b"", body])


def chunks(body: bytes, extension: bytes = b"") -> bytes:
    half = len(body) // 2
    parts = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in (body[:half], body[half:]))
    return parts + b"0\r\n\r\n"


VALID = {
    "probe": Piece(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "length": Piece(post(BODY, length(BODY)), 200),
    "chunks": Piece(post(chunks(BODY), CHUNKED), 200),
    "extensions": Piece(post(chunks(BODY, b";a=b"), b"transfer-encoding:chunked"), 200),
    "equal lengths": Piece(post(BODY, length(BODY), length(BODY)), 200),
    "headers": Piece(post(BODY, length(BODY), *(b"x-%d: %s" % (i, b"y" * 50) for i in range(60)), b"empty:"), 200),
    "no JSON": Piece(post(b"{", length(b"{")), 400),
    "unknown path": Piece(b"GET /v1/nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
    "other method": Piece(b"DELETE /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),
}
MALFORMED = {
    "length and chunks": post(chunks(BODY) + HIDDEN, length(BODY), CHUNKED),
    "chunks and length": post(chunks(BODY), CHUNKED, b"Content-Length: 4"),
    "two lengths": post(BODY, length(BODY), b"Content-Length: 5"),
    "list of lengths": post(BODY, b"Content-Length: %d, %d" % (len(BODY), len(BODY) - 1)),
    "plus": post(BODY, b"Content-Length: +%d" % len(BODY)),
    "negative": post(BODY, b"Content-Length: -1"),
    "2^64": post(BODY, b"Content-Length: 18446744073709551616"),
    "superscript": post(BODY, b"Content-Length: \xb2"),
    "hexadecimal": post(BODY, b"Content-Length: 0x10"),
    "longer": post(BODY, length(BODY, 1000)),
    "two encodings": post(chunks(BODY), CHUNKED, b"Transfer-Encoding: identity"),
    "unknown encoding": post(chunks(BODY), b"Transfer-Encoding: xchunked"),
    "space before the colon": post(chunks(BODY), b"Transfer-Encoding : chunked"),
    "no chunk size": post(b"zz\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "negative chunk": post(b"-1\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "huge chunk": post(b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "long chunk": post(b"3\r\nabcd\r\n0\r\n\r\n", CHUNKED),
    "long extension": post(b"3;" + b"x" * 20_000 + b"\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "line feeds": post(b"%x\n%s\n0\n\n" % (len(BODY), BODY), CHUNKED),
    "folded": post(BODY, length(BODY), b"X-A: 1\r\n folded: 2"),
    "carriage return": post(BODY, length(BODY), b"X-A: 1\rX-B: 2"),
    "NUL": post(BODY, length(BODY), b"X-A: \0"),
    "no colon": post(BODY, length(BODY), b"header"),
    "no name": post(BODY, length(BODY), b": value"),
    "many headers": post(BODY, length(BODY), *(b"x-%d: 1" % i for i in range(300))),
    "long header": post(BODY, length(BODY), b"X-A: " + b"a" * 100_000),
    "long path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "other host": post(BODY, length(BODY), line=b"POST http://evil/v1/embeddings HTTP/1.1"),
    "version 9": post(BODY, length(BODY), line=b"POST /v1/embeddings HTTP/9.9"),
    "no version": b"GET /health\r\n\r\n",
    "space in the path": post(BODY, length(BODY), line=b"POST /v1/ embeddings HTTP/1.1"),
    "tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n",
    "unknown method": b"BREW /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "header break in the path": b"GET /v1/%0d%0aSet-Cookie:x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "wrong encoding": post(BODY, length(BODY), b"Content-Encoding: gzip"),
    "expectation": post(BODY, length(BODY), b"Expect: 200-ok"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
}


def exchange(service: Service, content: bytes, expected: int = 0, cuts: Sequence[int] = ()) -> tuple[bytes, float]:
    """Send bytes in pieces. Returns the answers, and the seconds until the `expected` first ones came."""
    port = int(service.url.rpartition(":")[2])
    received, began_s, taken_s = b"", time.monotonic(), 0.0
    with socket.create_connection(("127.0.0.1", port), timeout=SLOWEST_S) as connection:
        try:
            for start, end in zip((0, *cuts), (*cuts, len(content)), strict=True):
                connection.sendall(content[start:end])
                time.sleep(0.005 if cuts else 0)
            while True:
                waits = len(_STATUS.findall(received)) < expected
                connection.settimeout(SLOWEST_S if waits else QUIET_S)
                part = connection.recv(1 << 16)
                if not part:
                    break
                received += part
                taken_s = time.monotonic() - began_s if waits else taken_s
        except (TimeoutError, ConnectionError):
            pass
    return received, taken_s


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in _STATUS.findall(received) if status != b"100"]


@pytest.fixture(scope="module", autouse=True)
def _others_are_served(service: Service) -> Iterator[None]:
    """While the tests of this file run, others are served, no process ends, and no memory is lost."""
    for piece in VALID.values():
        exchange(service, piece.content * 3, 3)
    before, processes = memory(service), (service.processes("Gateway"), service.processes("Replica"))
    with Others(service) as others:
        yield
    assert others.statuses == {200}
    assert max(others.waits_s) < SLOWEST_S
    assert (service.processes("Gateway"), service.processes("Replica")) == processes
    eventually("the memory is given back", lambda: memory(service) < 1.1 * before)


def test_what_is_malformed_is_refused_and_smuggles_nothing(service: Service) -> None:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = dict(zip(MALFORMED, pool.map(lambda each: exchange(service, each)[0], MALFORMED.values()), strict=True))
    for name, received in found.items():
        assert all(status < 500 for status in statuses(received)), (name, received)
        assert set(statuses(received)[1:]) <= {400}, (name, received)  # what follows is no request
        assert b"smuggled" not in received, (name, received)
        assert b"secret" not in received.lower(), (name, received)
        assert b"\r\nset-cookie" not in received.lower(), (name, received)


@pytest.mark.parametrize("name", VALID)
def test_unusual_requests_that_are_valid_are_answered(service: Service, name: str) -> None:
    received, _ = exchange(service, VALID[name].content * 3, 3)
    assert statuses(received) == [VALID[name].status] * 3, received


@st.composite
def broken(draw: st.DrawFn) -> Piece:
    """A malformed request, or one in which bytes are lost, changed or inserted, or noise."""
    source = draw(st.sampled_from([*MALFORMED.values(), *(piece.content for piece in VALID.values()), b""]))
    start = draw(st.integers(0, len(source)))
    end = draw(st.integers(start, min(len(source), start + 20)))
    inserted = draw(st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"\r\n", b"\r\n\r\n", b"\n", HIDDEN])))
    return Piece(source[:start] + inserted + source[end:])


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Piece], list[int]]:
    """Valid requests, malformed ones behind them, and where the bytes are cut."""
    answered = [piece for piece in VALID.values() if piece.status == 200]
    pieces = draw(st.lists(st.sampled_from(answered), max_size=3)) + draw(st.lists(broken(), max_size=2))
    size = sum(len(piece.content) for piece in pieces)
    return pieces, sorted(draw(st.lists(st.integers(0, size), max_size=5)))


@settings(max_examples=EXAMPLES, phases=[Phase.generate], derandomize=True)  # shrinking would take minutes
@given(connections=st.lists(streams(), min_size=CONNECTIONS, max_size=CONNECTIONS))
def test_streams_of_valid_and_malformed_requests_are_answered_without_500(
    service: Service, connections: list[tuple[list[Piece], list[int]]]
) -> None:
    def ask(stream: tuple[list[Piece], list[int]]) -> None:
        pieces, cuts = stream
        # A malformed request closes the connection, and what the client sent behind it may reset it before an answer.
        expected = [piece.status for piece in pieces] if all(piece.status for piece in pieces) else []
        received, taken_s = exchange(service, b"".join(piece.content for piece in pieces), len(expected), cuts)
        assert statuses(received)[: len(expected)] == expected, received
        assert all(status < 500 for status in statuses(received)), received
        assert taken_s < SLOWEST_S

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(ask, connections))
