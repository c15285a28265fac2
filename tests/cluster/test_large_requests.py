"""Large requests of every kind at once: each is refused or answered, others are served, memory comes back."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.service import BASE, Service, eventually

SIZE = 20_000_000
AT_ONCE = 6
MOST_PEAK = 1 << 30  # of a gateway's memory, beyond what it had: tokenising one such text took 1.5 GB
ACCENTS = "\u0301" * (SIZE // 2)


def body(end: bytes = b"}", **fields: Any) -> bytes:
    return json.dumps({"model": BASE, **fields}, ensure_ascii=False).encode().removesuffix(b"}") + end


BODIES: dict[str, tuple[str, int, Callable[[], bytes]]] = {
    "text": ("/v1/embeddings", 400, lambda: body(input=ACCENTS)),
    "truncated text": ("/v1/embeddings", 200, lambda: body(input=ACCENTS, truncate_prompt_tokens=8)),
    "text to tokenise": ("/tokenize", 400, lambda: body(prompt=ACCENTS)),
    "name": ("/v1/embeddings", 404, lambda: body(input="a", lora_path="m" * SIZE)),
    "empty lists": ("/v1/embeddings", 400, lambda: body(b', "input": [' + b"[]," * (SIZE // 3) + b"[]]}")),
    "objects": ("/v1/embeddings", 400, lambda: body(b', "x": [' + b"{}," * (SIZE // 3) + b"{}]}", input="a")),
    "token ids": ("/v1/embeddings", 400, lambda: body(b', "input": [' + b"7," * (SIZE // 2) + b"7]}")),
    "ids of a text": ("/detokenize", 400, lambda: body(b', "tokens": [' + b"7," * (SIZE // 2) + b"7]}")),
    "wrong ids of a text": ("/detokenize", 400, lambda: body(b', "tokens": [' + b'"",' * (SIZE // 3) + b'""]}')),
}


def memory(service: Service) -> int:
    """Return the resident bytes of all gateways."""
    pages = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in service.processes("Gateway").values())
    return sum(map(int, pages)) * 4096


class Others:
    """A client that sends small requests, and watches the gateways' memory, while the context lasts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.waits_s: list[float] = []
        self.statuses: set[int] = set()
        self.peak = 0

    def __enter__(self) -> "Others":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        pids = self._service.processes("Gateway").values()
        with httpx.Client(base_url=self._service.url, timeout=60, trust_env=False) as http:
            while not self._end.wait(0.02):
                began_s = time.monotonic()
                self.statuses.add(http.post("/v1/embeddings", json={"model": BASE, "input": "others"}).status_code)
                self.waits_s.append(time.monotonic() - began_s)
                pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
                self.peak = max(self.peak, sum(pages) * 4096)


@pytest.fixture(scope="module")
def warm(service: Service) -> Service:
    """The service after large requests of each kind, which load code and fill caches that stay."""
    for path, _, make in BODIES.values():
        service.http.post(path, content=make())
    return service


@pytest.mark.parametrize("kind", BODIES)
def test_large_requests_at_once_harm_nobody(warm: Service, kind: str) -> None:
    path, status, make = BODIES[kind]
    content, before = make(), memory(warm)
    processes = warm.processes("Gateway"), warm.processes("Replica")
    with Others(warm) as others, ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda _: warm.http.post(path, content=content), range(AT_ONCE)))
    assert {answer.status_code for answer in answers} == {status}, answers[0].text[:500]
    if status != 200:
        assert all(len(answer.content) < 2000 for answer in answers), "values of the request are not repeated in full"
    assert others.statuses == {200}
    assert max(others.waits_s) < 5, "on a busy machine; it was 30 s"
    assert others.peak - before < MOST_PEAK
    assert (warm.processes("Gateway"), warm.processes("Replica")) == processes
    eventually("the memory is given back", lambda: memory(warm) < 1.1 * before, 30)
