"""HAProxy sends a silent gateway no new requests at once, and ends those that it has after a while."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.cluster.command.test_front_door import FrontDoor, error_of, front_door, named_gateway
from tests.cluster.load import gateways_down
from tests.cluster.service import eventually
from tests.needs import needs

pytestmark = needs("haproxy")
LIMIT = "RANKLET_SILENT_GATEWAY_S"
# More than HAProxy's own checks take to notice it, and more than three refused connections take.
SHORT, REFUSED, LONG = {LIMIT: "6"}, {LIMIT: "15"}, {LIMIT: "300"}

NamedGateway = tuple["subprocess.Popen[bytes]", int]


@pytest.fixture
def gateway() -> Iterator[NamedGateway]:
    with named_gateway() as started:
        yield started


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def ask(door: FrontDoor, path: str) -> str | None:
    """Return the id of the process that answered; None for an error or a connection that was closed."""
    try:
        answer = httpx.post(door.url + path, json={"input": "a text"}, timeout=60)
    except httpx.RemoteProtocolError:
        return None
    assert answer.status_code == 200 or error_of(answer) in ((502, "unavailable", "1"), (503, "unavailable", "1"))
    return answer.text if answer.status_code == 200 else None


def wait_until_taken(gateway: "subprocess.Popen[bytes]") -> None:
    assert gateway.stdout
    assert gateway.stdout.readline() == b"taken\n"


def held_by(
    gateway: "subprocess.Popen[bytes]", pool: ThreadPoolExecutor, door: FrontDoor, path: str = "/held"
) -> "Future[str | None]":
    """Send a request, and return its future answer once the gateway has it."""
    held = pool.submit(ask, door, path)
    wait_until_taken(gateway)
    return held


def answer_held(gateway: "subprocess.Popen[bytes]", count: int) -> None:
    assert gateway.stdin
    gateway.stdin.write(b"\n" * count)
    gateway.stdin.flush()


def test_a_gateway_that_hangs_is_passed_over(gateway: NamedGateway, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """The requests that it has taken end with an error that clients repeat, and others do not notice."""
    victim, port = gateway
    with named_gateway() as (other, other_port), front_door(tmp_path / "two", {"/": [port, other_port]}, SHORT) as door:

        def answers(count: int) -> set[str | None]:
            return set(pool.map(lambda path: ask(door, path), ["/v1/embeddings"] * count))

        processes = {str(victim.pid), str(other.pid)}
        eventually("both are up", lambda: answers(4) == processes)
        held = [pool.submit(ask, door, "/held") for _ in range(4)]
        wait_until_taken(victim)
        victim.send_signal(signal.SIGSTOP)
        eventually("it is passed over", lambda: answers(4) == {str(other.pid)})
        answer_held(other, len(held))
        assert {each.result() for each in held} == {str(other.pid), None}
        victim.send_signal(signal.SIGCONT)
        eventually("it is asked again", lambda: answers(4) == processes)


def test_requests_of_a_gateway_that_goes_on_in_time_are_answered(
    gateway: NamedGateway, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """A busy machine may give a gateway no CPU time for some seconds, in which HAProxy answers new requests itself."""
    process, port = gateway
    with front_door(tmp_path / "door", {"/": [port]}, LONG) as door:
        eventually("it is up", lambda: door.status("/health") == 200)
        held = held_by(process, pool, door)
        process.send_signal(signal.SIGSTOP)
        eventually("it gets no new requests", lambda: gateways_down(door.metrics) == 1)
        assert not held.done()
        process.send_signal(signal.SIGCONT)
        answer_held(process, 1)
        assert held.result() == str(process.pid)


def test_requests_of_a_gateway_that_refuses_connections_are_answered(
    gateway: NamedGateway, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """A gateway that drains takes no connections, and answers the requests that it has."""
    draining, port = gateway
    with named_gateway() as (silent, silent_port):
        both = {"/": [port], "/silent": [silent_port]}
        with front_door(tmp_path / "door", both, REFUSED) as door:
            eventually("one is up", lambda: ask(door, "/") == str(draining.pid))
            eventually("both are up", lambda: ask(door, "/silent/") == str(silent.pid))
            last = held_by(draining, pool, door, "/last")
            held = held_by(silent, pool, door, "/silent/held")
            silent.send_signal(signal.SIGSTOP)
            assert held.result() is None
            answer_held(draining, 1)
            assert last.result() == str(draining.pid)


def test_requests_of_a_silent_gateway_end_in_a_haproxy_that_was_replaced_too(
    gateway: NamedGateway, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """HAProxy's own checks stop there."""
    process, port = gateway
    with front_door(tmp_path / "door", {"/": [port]}, SHORT) as door:
        eventually("it is up", lambda: door.status("/health") == 200)
        held = held_by(process, pool, door)
        door.process.send_signal(signal.SIGUSR1)
        eventually("it takes no connections", lambda: door.status("/health") is None, poll_s=0.05)
        process.send_signal(signal.SIGSTOP)
        assert held.result() is None
        assert door.process.wait(30) == 0
