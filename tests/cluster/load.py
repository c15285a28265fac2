"""Load with a death in the middle, every answer judged. Shared by the tests of both data paths."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest

from tests.cluster.service import BASE, Service, Vectors, eventually, vectors_of

LOAD_S = 6.0
WORKERS = 8
MODELS = (BASE, "legal-v2", "medical", "support-rs", "finance-mlp")
LONG_TEXT = "a long text about nothing in particular " * 25
TEXTS = [f"text number {number}" for number in range(8)]


@dataclass
class LoadResult:
    """What clients saw: answers that were right, wrong or refused, and how long the slowest took, after the fault."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def __getitem__(self, outcome: str) -> int:
        return self.counts[outcome]


def run_under_load(service: Service, fault: Callable[[], object], seconds: float = LOAD_S) -> LoadResult:
    """Let something happen after a third of the time while all models are asked.

    A connection that is lost raises: it would be a lost request.
    """
    expected = {model: service.embed(model, TEXTS) for model in MODELS}
    stop = threading.Event()
    seen = LoadResult()
    fault_s = time.monotonic() + seconds / 3

    def ask(worker: int) -> None:
        with httpx.Client(base_url=service.url, headers=service.http.headers, timeout=60, trust_env=False) as client:
            turn = worker
            while not stop.is_set():
                model, text = MODELS[turn % len(MODELS)], turn % len(TEXTS)
                body = {"model": model, "input": TEXTS[text], "encoding_format": "base64"}
                began_s = time.monotonic()
                answer = client.post("/v1/embeddings", json=body)
                seen.slowest_s = max(seen.slowest_s, time.monotonic() - max(began_s, fault_s))
                seen.counts[_judged(answer, expected[model][text])] += 1
                turn += WORKERS

    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(ask, worker) for worker in range(WORKERS)]
        time.sleep(fault_s - time.monotonic())
        fault()
        time.sleep(seconds * 2 / 3)
        stop.set()
        for worker in running:
            worker.result(timeout=90)
    return seen


def kill_replica_under_load(service: Service, victim: int) -> LoadResult:
    """SIGKILL one of the replicas."""
    process = list(service.processes("Replica").values())[victim]
    return run_under_load(service, lambda: os.kill(process, signal.SIGKILL))


def _judged(answer: httpx.Response, expected: Vectors) -> str:
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] in ("unavailable", "saturated", "adapter_loading")
        return "refused"
    assert answer.status_code == 200, answer.text
    return "right" if np.abs(vectors_of(answer)[0] - expected).max() < 1e-5 else "wrong"


def kill_during_request(service: Service) -> None:
    """SIGKILL the replica that works on a long request; another must answer it, and rightly."""
    texts = [f"{number} {LONG_TEXT}" for number in range(400)]
    home = service.post("legal-v2", "where").headers["x-ranklet-replica"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.post, "legal-v2", texts, encoding_format="base64")
        time.sleep(0.7)
        assert not asked.done(), "too fast for this test: make the texts longer"
        os.kill(service.processes("Replica")[home], signal.SIGKILL)
        answer = asked.result()
    assert answer.status_code == 200, answer.text
    assert home not in answer.headers["x-ranklet-replica"]
    sampled = service.expected("legal-v2", [texts[0], texts[399]])
    assert np.abs(vectors_of(answer)[[0, 399]] - sampled).max() < 1e-5


def wait_for_recovery(service: Service) -> None:
    """Both replicas run again, under the ranks of before."""
    eventually("two replicas with their ranks", lambda: sorted(_ranks(service)) == ["0", "1"])


def wait_for_two(service: Service) -> None:
    """Two replicas run again. One that replaces another while that still drains gets a rank of its own."""
    eventually("two replicas", lambda: len(_ranks(service)) == 2)


def _ranks(service: Service) -> list[str]:
    return [group["labels"]["rank"] for group in service.targets() if group["labels"]["role"] == "replica"]


def disconnect_early(service: Service) -> None:
    """A client hangs up on a long request: its prompts must never reach the device."""
    texts = [f"{number} {LONG_TEXT}" for number in range(1500)]
    gone = service.samples("gateway")["ranklet_client_gone_total"]
    before = service.samples("replica")
    hasty = httpx.Client(base_url=service.url, headers=service.http.headers, trust_env=False)
    with contextlib.suppress(httpx.ReadTimeout), hasty as client:
        client.post("/v1/embeddings", json={"model": "legal-v2", "input": texts}, timeout=httpx.Timeout(30, read=1.5))
        pytest.fail("too fast for this test: make the texts longer")
    eventually("the gateway noticed", lambda: service.samples("gateway")["ranklet_client_gone_total"] == gone + 1, 10)
    eventually("nothing waits", lambda: service.samples("replica")["ranklet_waiting_requests"] == 0, 10)
    after = service.samples("replica")
    assert after["ranklet_cancelled_prompts_total"] - before["ranklet_cancelled_prompts_total"] > 500
    assert after["ranklet_prompts_total"] - before["ranklet_prompts_total"] < 1000
    assert service.samples("gateway")["ranklet_requests_in_flight"] == 0
