"""How texts end early over HTTP: clients that leave, clients that do not read, and engines that fail."""

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.cluster.nodes import engine_process
from tests.cluster.service import BASE, Service, eventually
from tests.cluster.text_client import CHAT, COMPLETIONS, PROMPT, TextService, events_of

LONG = {"model": BASE, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
LONG_PROMPTS = [[3 + number, *range(3, 1003), *range(3, 1003), *range(3, 1003)] for number in range(32)]


@contextmanager
def client(
    service: Service, fields: dict[str, Any], pause_s: float = 0.0, *, path: str = COMPLETIONS, port: int | None = None
) -> Iterator[socket.socket]:
    """Send a request, its body `pause_s` behind its header. The client leaves at the end of the context."""
    body = orjson.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    url = httpx.URL(service.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect((url.host, port or url.port or 80))
        for part in (f"{head}\r\n\r\n".encode(), body) if pause_s else (f"{head}\r\n\r\n".encode() + body,):
            connection.sendall(part)
            time.sleep(pause_s)
        yield connection


def gateway_port(service: Service) -> int:
    """Return the port on which the gateway listens for HAProxy."""
    (configuration,) = Path(service.cluster.state.temp_dir, "haproxy").rglob("haproxy*.cfg")
    servers = re.findall(r"^ *server \S+ \S+:(\d+) check(.*)$", configuration.read_text(), re.MULTILINE)
    (port,) = {int(port) for port, options in servers if "backup" not in options}
    return port


def used_pages(service: Service) -> float:
    return service.samples("replica", state="used")["ranklet_kv_pages"]


def cancelled(service: Service, reason: str = "client_gone") -> float:
    return service.samples("gateway", reason=reason)["ranklet_text_cancelled_total"]


def generated(service: Service) -> float:
    return service.samples("replica")["ranklet_generated_tokens_total"]


def engine_pid(service: Service) -> int:
    (replica,) = service.processes("Replica").values()
    return engine_process(replica)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_a_client_that_leaves_frees_its_pages(service: Service, pause_s: float, *, stream: bool) -> None:
    """With splicing, HAProxy 2.8 notices it only if the request's header and body came in one packet."""
    gone = cancelled(service)
    with client(service, {**LONG, "stream": stream}, pause_s):
        eventually("pages are used", lambda: used_pages(service) > 0, poll_s=0.05)
    eventually("the pages are free", lambda: used_pages(service) == 0)
    eventually("the cancel is counted", lambda: cancelled(service) == gone + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_prompts_are_computed_costs_no_further_steps(
    service: Service, *, stream: bool
) -> None:
    """Some prompts are being computed while the others wait."""
    gone, before = cancelled(service), service.samples("replica")
    with client(service, {**LONG, "prompt": LONG_PROMPTS, "max_tokens": 50, "stream": stream}, 0.1):
        eventually("pages are used", lambda: used_pages(service) > 0, poll_s=0.02)
    eventually("the pages are free", lambda: used_pages(service) == 0)
    eventually("the cancel is counted", lambda: cancelled(service) == gone + 1)
    after = service.samples("replica")
    assert after["ranklet_waiting_sequences"] == after["ranklet_running_sequences"] == 0
    dropped = after["ranklet_cancelled_prompts_total"] - before["ranklet_cancelled_prompts_total"]
    assert dropped > 0


def test_a_client_that_leaves_while_its_request_is_queued_costs_no_step(service: Service) -> None:
    gone, made = cancelled(service), generated(service)
    engine = engine_pid(service)
    os.kill(engine, signal.SIGSTOP)
    try:
        with client(service, LONG, 0.1):
            eventually("the request is sent", lambda: in_flight(service) == 1, poll_s=0.05)
        eventually("the cancel is counted", lambda: cancelled(service) == gone + 1, poll_s=0.05)
    finally:
        os.kill(engine, signal.SIGCONT)
    answer = TextService(service.http).whole(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 3
    eventually("the pages are free", lambda: used_pages(service) == 0)
    assert generated(service) <= made + 3 + 2


def in_flight(service: Service) -> float:
    return service.samples("gateway")["ranklet_requests_in_flight"]


def test_a_client_that_does_not_read_loses_its_request_and_holds_up_no_other(service: Service) -> None:
    """Without HAProxy between them, whose sockets hold up to 10 MB."""
    slow_readers, before = cancelled(service, "slow_reader"), generated(service)
    large = {
        "model": BASE, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1400, "n": 8, "logprobs": True,
        "top_logprobs": 20, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    text, other = TextService(service.http), {"prompt": PROMPT, "max_tokens": 20, "seed": 1, "ignore_eos": True}
    expected = text.whole(COMPLETIONS, other)["choices"][0]["text"]
    others = 1
    with client(service, large, path=CHAT, port=gateway_port(service)) as connection:
        received = connection.recv(1000)
        assert received.startswith(b"HTTP/1.1 200 ")
        while used_pages(service) > 0:
            assert text.streamed(COMPLETIONS, other)["choices"][0]["text"] == expected
            others += 1
        assert generated(service) - before - 20 * others < 8 * 1400
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1 << 20)
    assert b'"code":"reader_too_slow"' in received
    assert b"data: [DONE]" in received
    assert others > 1, "others are answered meanwhile"
    eventually("it is counted", lambda: cancelled(service, "slow_reader") == slow_readers + 1)


def test_an_error_after_the_first_token_is_an_event(service: Service) -> None:
    """The adapter's files are gone, so the replica that replaces the only one cannot continue the text."""
    failed, engine, doomed = cancelled(service, "error"), engine_pid(service), service.adapters / "doomed"
    shutil.copytree(service.adapters / "legal-v2", doomed)
    with service.http.stream("POST", COMPLETIONS, json={**LONG, "model": doomed.name, "stream": True}) as answer:
        parts = answer.iter_raw()
        body = next(parts)
        shutil.rmtree(doomed)
        os.kill(engine, signal.SIGKILL)
        body += b"".join(parts)
    assert answer.status_code == 200
    *texts, last = events_of(body)
    assert texts
    assert all("choices" in event for event in texts)
    assert last["error"]["code"] in ("adapter_not_found", "unavailable"), last
    assert cancelled(service, "error") == failed + 1

    def answers() -> bool:
        return TextService(service.http).post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1}).status_code == 200

    eventually("another replica answers", answers)
