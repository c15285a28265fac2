"""Large requests of every kind at once: each is refused or answered, others are served, memory comes back."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.others import Others, memory
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
    eventually("the memory is given back", lambda: memory(warm) < 1.1 * before)
