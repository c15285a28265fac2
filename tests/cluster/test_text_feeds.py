"""Tokens on their way from two engines through Ray Serve to a gateway, while feeds break and replicas die."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ranklet.cluster.command.local_cluster import LocalCluster
from tests.cluster.nodes import engine_process
from tests.cluster.service import ROOT, TIMEOUT_S, Service, eventually, serving, text_configuration
from tests.needs import require

LONG = {"max_tokens": 3000, "temperature": 0.0, "ignore_eos": True}


class TextClient:
    """Sends requests to the gateway of `text_app`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._threads = ThreadPoolExecutor(64)
        self._count = 0

    def start(self, params: dict[str, Any], adapter: str | None = None, **fields: Any) -> "tuple[str, Future[Any]]":
        """Send a request. Returns its id for `seen`, and its answer."""
        self._count += 1
        id, number = str(self._count), self._count
        prompts = fields.pop("prompts", [[3 + (7 * number + i) % 1000 for i in range(10 + number % 5)]])
        body = {"adapter": adapter, "prompts": prompts, "params": params, **fields}
        return id, self._threads.submit(self._post, f"/generate/{id}", body)

    def generate(self, params: dict[str, Any], adapter: str | None = None, **fields: Any) -> Any:
        return self.start(params, adapter, **fields)[1].result()

    def _post(self, path: str, body: Any) -> Any:
        answer = httpx.post(self.service.url + path, json=body, timeout=TIMEOUT_S, trust_env=False)
        return answer.raise_for_status().json()

    def seen(self, id: str) -> Any:
        answer = self.service.http.get(f"/seen/{id}")
        return answer.json() if answer.status_code == 200 else {"begun": [], "tokens": {}}

    def tokens(self, id: str) -> int:
        """Number of tokens of the first text."""
        return len(self.seen(id)["tokens"].get("0", ()))

    def state(self) -> Any:
        return self.service.http.get("/ready").raise_for_status().json()

    def generated(self) -> float:
        return self.service.samples("replica")["ranklet_generated_tokens_total"]

    def used_pages(self) -> float:
        return self.service.samples("replica", state="used")["ranklet_kv_pages"]


@pytest.fixture(scope="module")
def text(runs_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextClient]:
    require("haproxy")
    folder = tmp_path_factory.mktemp("feeds")
    content = text_configuration(folder)
    application = content["applications"][0]
    application["import_path"] = "tests.cluster.text_app:build"
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    cluster = LocalCluster(http_port=0, report=print, environment={"PYTHONPATH": os.pathsep.join(paths)})
    with serving(content, folder, cluster) as service:
        yield TextClient(service)


def is_whole(answer: Any) -> bool:
    """Return whether the texts that were received are those of the answer."""
    received = [answer["tokens"].get(str(index), []) for index in range(len(answer["answer"]))]
    return not answer["error"] and received == answer["answer"]


def test_32_streams_of_base_and_adapters_are_received_token_by_token(text: TextClient) -> None:
    params = {"max_tokens": 60, "temperature": 0.8, "seed": 5, "ignore_eos": True, "logprobs": 1}
    adapters = [None, *sorted(path.name for path in text.service.adapters.iterdir())]
    text.generate(params)  # opens the feeds
    eventually("a feed of each replica", lambda: text.state()["opened"] == 2)
    streams = [text.start(params, adapters[i % len(adapters)])[1] for i in range(32)]
    for i, stream in enumerate(streams):
        answer = stream.result()
        assert is_whole(answer)
        assert [len(tokens) for tokens in answer["answer"]] == [60]
        assert [len(top) for _, top in answer["logprobs"]] == [1] * 60
        assert answer["receipts"] > 30, "most tokens come by the feed, not with the answer"
        assert bool(answer["begun"][0]["revision"]) == bool(i % len(adapters))
    assert text.state()["gaps"] == 0
    assert text.state()["opened"] == 2


def test_choices_of_many_prompts_are_received_in_their_order(text: TextClient) -> None:
    prompts = [[3 + i, 4, 5] for i in range(40)]
    answer = text.generate({"max_tokens": 5, "temperature": 0.9, "seed": 1, "n": 2}, prompts=prompts)
    assert is_whole(answer)
    assert len(answer["answer"]) == 80
    again = text.generate({"max_tokens": 5, "temperature": 0.9, "seed": 1, "n": 2}, prompts=prompts)
    assert again["answer"] == answer["answer"]


def test_a_text_that_is_not_wanted_any_more_ends_early(text: TextClient) -> None:
    answer = text.generate(LONG, most=20)
    assert answer["tokens"]["0"] == answer["answer"][0][:20]
    assert answer["reasons"] == ["stop"]
    assert len(answer["answer"][0]) < 1000


def test_tokens_of_a_broken_feed_are_received_at_the_end(text: TextClient) -> None:
    before = text.state()
    id, stream = text.start({**LONG, "max_tokens": 1000})
    eventually("the first tokens", lambda: text.tokens(id) > 5, poll_s=0.02)
    replica = text.seen(id)["begun"][0]["replica"]
    assert text.service.http.post(f"/take_feed/{replica}").json()["taken"] > 0
    answer = stream.result()
    assert is_whole(answer)
    assert len(answer["answer"][0]) == 1000
    after = text.state()
    assert after["opened"] > before["opened"]
    assert after["gaps"] > before["gaps"]
    assert is_whole(text.generate({**LONG, "max_tokens": 30}))


def test_a_request_that_is_cancelled_frees_its_pages(text: TextClient) -> None:
    text.generate({**LONG, "max_tokens": 1})
    eventually("no pages", lambda: text.used_pages() == 0)
    id, stream = text.start({**LONG, "n": 2}, prompts=[[5] * 200, [6] * 10])
    eventually("the first tokens", lambda: text.tokens(id) > 5, poll_s=0.02)
    assert text.used_pages() > 0
    generated = text.generated()
    text.service.http.post(f"/cancel/{id}")
    assert stream.result()["error"] == "cancelled"
    eventually("no pages again", lambda: text.used_pages() == 0)
    count = text.tokens(id)
    assert 5 < count < 3000
    assert text.generated() - generated < 1000
    time.sleep(0.5)
    assert text.tokens(id) == count


def test_a_text_is_repeated_before_its_first_token_and_continued_after_it(text: TextClient) -> None:
    replicas = text.service.processes("Replica")
    engines = {id: engine_process(pid) for id, pid in replicas.items()}
    retries = text.state()["retries"]
    for engine in engines.values():
        os.kill(engine, signal.SIGSTOP)
    try:
        id, stream = text.start({**LONG, "max_tokens": 50})
        eventually("a replica has the call", lambda: bool(text.seen(id)["begun"]), poll_s=0.02)
        first = text.seen(id)["begun"][0]["replica"]
        assert text.tokens(id) == 0
        os.kill(replicas[first], signal.SIGKILL)
    finally:
        for engine in engines.values():
            os.kill(engine, signal.SIGCONT)
    answer = stream.result()
    assert is_whole(answer)
    assert [each["replica"] == first for each in answer["begun"]] == [True, False]
    assert text.state()["retries"] == retries + 1
    assert text.state()["continuations"] == 0

    def has_new_feeds(*gone: str) -> bool:
        live = set(text.service.processes("Replica"))
        return len(live) == 2 and not live.intersection(gone) and set(text.state()["feeds"]) == live

    eventually("feeds of two replicas", lambda: has_new_feeds(first))
    sampled = {"max_tokens": 500, "temperature": 0.9, "seed": 3, "ignore_eos": True, "n": 2, "logprobs": 0}
    prompts = [[5, 6, 7], [8, 9]]
    expected = text.generate(sampled, prompts=prompts)
    id, stream = text.start(sampled, prompts=prompts)
    eventually("the first tokens", lambda: text.tokens(id) > 5, poll_s=0.02)
    second = text.seen(id)["begun"][0]["replica"]
    os.kill(text.service.processes("Replica")[second], signal.SIGKILL)
    answer = stream.result()
    assert is_whole(answer)
    assert answer["answer"] == expected["answer"]
    assert len(answer["logprobs"]) == len(expected["logprobs"]) == 4 * 500
    assert [each["replica"] == second for each in answer["begun"]] == [True, False]
    assert text.state()["continuations"] == 1
    eventually("feeds of two new replicas", lambda: has_new_feeds(first, second))
    assert is_whole(text.generate({**LONG, "max_tokens": 30}))
