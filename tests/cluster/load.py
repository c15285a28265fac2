"""Load on a service while a process dies or changes, for tests of both data paths. Every answer is checked."""

import http.client
import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import numpy as np

from tests.cluster.service import BASE, TIMEOUT_S, Service, Vectors, eventually, summed_samples, vectors_of

BEFORE, AFTER = 50, 150  # answers before and after a fault
WORKERS = 8
PAUSE_S = 0.05  # between two requests of a worker: leaves the cores time for what the test waits for
MODELS = (BASE, "legal-v2", "medical", "support-rs", "finance-mlp")
LONG_TEXT = "a long text about nothing in particular " * 25
TEXTS = [f"text number {number}" for number in range(8)]


@dataclass
class LoadResult:
    """Counts of right, wrong and refused answers. `slowest_s` is the longest wait for an answer after the fault."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def __getitem__(self, outcome: str) -> int:
        return self.counts[outcome]


def run_under_load(service: Service, fault: Callable[[], object], models: Sequence[str] = MODELS) -> LoadResult:
    """Request embeddings of the models before, during and after the call of `fault`. All of them must be answered.

    Raises:
        httpx.TransportError: a connection was lost, and its request with it.
    """
    expected = {model: service.embed(model, TEXTS) for model in models}
    stop, lock = threading.Event(), threading.Lock()
    result = LoadResult()
    client = httpx.Client(base_url=service.url, headers=service.http.headers, timeout=TIMEOUT_S, trust_env=False)
    fault_s = math.inf

    def send_requests(worker: int) -> None:
        turn = worker
        while not stop.is_set():
            model, text = models[turn % len(models)], turn % len(TEXTS)
            body = {"model": model, "input": TEXTS[text], "encoding_format": "base64"}
            start_s = time.monotonic()
            answer = client.post("/v1/embeddings", json=body)
            passed_s = time.monotonic() - max(start_s, fault_s)
            outcome = _classify(answer, expected[model][text])
            with lock:
                result.slowest_s = max(result.slowest_s, passed_s)
                result.counts[outcome] += 1
            turn += WORKERS
            stop.wait(PAUSE_S)

    def wait_for_answers(count: int) -> None:
        end = result.counts.total() + count
        eventually(
            f"{count} answers",
            lambda: result.counts.total() >= end or any(each.done() for each in workers),
            poll_s=0.05,
        )

    with client, ThreadPoolExecutor(WORKERS) as pool:
        workers = [pool.submit(send_requests, worker) for worker in range(WORKERS)]
        try:
            wait_for_answers(BEFORE)
            fault_s = time.monotonic()
            fault()
            wait_for_answers(AFTER)
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    return result


def kill_replica_under_load(service: Service, victim: int) -> LoadResult:
    process = list(service.processes("Replica").values())[victim]
    return run_under_load(service, lambda: os.kill(process, signal.SIGKILL))


def _classify(answer: httpx.Response, expected: Vectors) -> str:
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] in ("unavailable", "saturated", "adapter_loading")
        return "refused"
    assert answer.status_code == 200, answer.text
    return "right" if np.abs(vectors_of(answer)[0] - expected).max() < 1e-5 else "wrong"


def kill_during_request(service: Service) -> None:
    """Send SIGKILL to the replica that computes a long request. Another replica must answer the request correctly."""
    texts = [f"{number} {LONG_TEXT}" for number in range(400)]
    home = service.post("legal-v2", "where").headers["x-ranklet-replica"]
    replica = service.processes("Replica")[home]  # read before the request, because it takes long
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(service.post, "legal-v2", texts, encoding_format="base64")
        _wait_until_queued(service)
        assert not pending.done(), "too fast for this test: make the texts longer"
        os.kill(replica, signal.SIGKILL)
        answer = pending.result()
    assert answer.status_code == 200, answer.text
    assert home not in answer.headers["x-ranklet-replica"]
    expected = service.expected("legal-v2", [texts[0], texts[399]])
    assert np.abs(vectors_of(answer)[[0, 399]] - expected).max() < 1e-5


def wait_for_recovery(service: Service) -> None:
    """Wait until two replicas run, with the ranks from before."""
    eventually("two replicas with their ranks", lambda: sorted(_ranks(service)) == ["0", "1"])


def wait_for_two(service: Service) -> None:
    """Wait until two replicas run, with any ranks: while a lost replica drains, its successor gets another rank."""
    eventually("two replicas", lambda: len(_ranks(service)) == 2)


def of_gateways(service: Service, metric: str) -> dict[str, int]:
    """Return a metric of each gateway, by its id."""
    return {
        each["labels"]["replica"]: round(summed_samples(each["targets"], {}).get(metric, 0))
        for each in service.targets()
        if each["labels"]["role"] == "gateway"
    }


def wait_for_gateways(service: Service, count: int) -> None:
    """Wait until `count` gateways get requests: HAProxy learns of each a moment after it is up."""
    eventually("the gateways", lambda: len(of_gateways(service, "ranklet_requests_total")) == count)
    before = of_gateways(service, "ranklet_requests_total")

    def get_requests() -> bool:
        for _ in range(2 * count):
            service.embed(BASE, "text")
        now = of_gateways(service, "ranklet_requests_total")
        return now.keys() == before.keys() and all(now[id] > before[id] for id in now)

    eventually("all gateways get requests", get_requests)


def gateways_down(metrics_port: int) -> int:
    """Return how many gateways HAProxy passes over, by its own metrics."""
    states = ("DOWN", "NOLB")  # NOLB: it drains
    return sum(
        round(summed_samples([f"127.0.0.1:{metrics_port}"], {"state": state})["haproxy_server_status"])
        for state in states
    )


def _ranks(service: Service) -> list[str]:
    return [group["labels"]["rank"] for group in service.targets() if group["labels"]["role"] == "replica"]


def disconnect_early(service: Service) -> None:
    """Disconnect while a long request is queued. Most of its prompts must never reach the device."""
    texts = [f"{number} {LONG_TEXT}" for number in range(1500)]
    gone = service.samples("gateway")["ranklet_client_gone_total"]
    before = service.samples("replica")
    url = httpx.URL(service.url)
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=TIMEOUT_S)
    body = json.dumps({"model": "legal-v2", "input": texts})
    connection.request(
        "POST", "/v1/embeddings", body, dict(service.http.headers) | {"content-type": "application/json"}
    )
    _wait_until_queued(service)
    connection.close()
    eventually("the disconnect is counted", lambda: service.samples("gateway")["ranklet_client_gone_total"] == gone + 1)
    eventually("the queue is empty", lambda: _queued(service) == 0)
    after = service.samples("replica")
    assert after["ranklet_cancelled_prompts_total"] - before["ranklet_cancelled_prompts_total"] > 500
    assert after["ranklet_prompts_total"] - before["ranklet_prompts_total"] < 1000
    assert service.samples("gateway")["ranklet_requests_in_flight"] == 0


def _wait_until_queued(service: Service) -> None:
    eventually("a replica has the request", lambda: _queued(service) > 0, poll_s=0.05)


def _queued(service: Service) -> float:
    return service.samples("replica")["ranklet_waiting_requests"]
