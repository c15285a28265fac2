"""Two replicas die one right after the other, under texts that the second was to continue. Each is right."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.cluster.nodes import engine_process
from tests.cluster.service import BASE, Service, eventually, serving, summed_samples, text_configuration
from tests.cluster.stream_load import StreamLoad
from tests.needs import require

STREAMS = 6
TOKENS = 1000
HANDS_OVER_S = 0.5  # in which the second replica gets the texts. A slower one makes the test easier
STARTS_S = 120.0  # longest time until replicas have replaced both


@pytest.fixture(scope="module")
def service(runs_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    require("haproxy")
    folder = tmp_path_factory.mktemp("deaths")
    content = text_configuration(folder)
    content["applications"][0]["args"]["limits"] = {"no_replica_timeout_s": STARTS_S, "request_timeout_s": STARTS_S}
    with serving(content, folder) as service:
        yield service


@pytest.fixture(scope="module")
def streams(service: Service) -> StreamLoad:
    models = [BASE, *sorted(path.name for path in service.adapters.iterdir())]
    sampled = {"temperature": 0.9, "seed": 3, "n": 2, "logprobs": 0}
    return StreamLoad(
        service.url,
        [
            {
                "model": models[i % 3], "prompt": [5 + i, 6, 7], "max_tokens": TOKENS, "ignore_eos": True,
                "return_token_ids": True, **(sampled if i == STREAMS - 1 else {"temperature": 0.0}),
            }
            for i in range(STREAMS)
        ],
    )  # fmt: skip


@pytest.mark.parametrize("dies", ["before a token", "after a few tokens"])
def test_texts_go_on_when_the_replica_that_continues_them_dies_too(
    service: Service, streams: StreamLoad, dies: str
) -> None:
    eventually("two replicas", lambda: len(service.processes("Replica")) == 2)
    replicas = service.processes("Replica")
    first, second = replicas
    gateway, of_second = target(service, role="gateway"), target(service, replica=second)
    streams.clear()
    continued = count(gateway, "ranklet_continuations_total")
    engine_of_first, engine_of_second = (engine_process(replicas[id]) for id in (first, second))
    with streams.running(STREAMS, most=STREAMS):
        eventually("all streams have begun", lambda: streams.opened.total() == STREAMS, poll_s=0.02)
        os.kill(engine_of_first, signal.SIGSTOP)  # so that no text ends while numbers are read
        assert not streams.ended, "too fast for this test: make the texts longer"
        moved, computed = streams.opened[first], count(of_second, "ranklet_prompts_total")
        if dies == "before a token":
            os.kill(engine_of_second, signal.SIGSTOP)
        os.kill(replicas[first], signal.SIGKILL)
        eventually(
            "texts are sent to the second, or end",
            lambda: count(gateway, "ranklet_continuations_total") >= continued + moved or streams.ended > 0,
            poll_s=0.01,
        )  # fmt: skip
        assert not streams.ended, (moved, streams.opened, streams.verdicts, streams.errors)
        if dies == "before a token":
            time.sleep(HANDS_OVER_S)
        else:
            eventually(
                "the second computes them", lambda: count(of_second, "ranklet_prompts_total") >= computed + moved,
                poll_s=0.01,
            )  # fmt: skip
        os.kill(replicas[second], signal.SIGKILL)
    assert 0 < moved < STREAMS, streams.opened
    assert streams.verdicts == {"right": STREAMS}, (streams.verdicts, streams.errors)
    again = count(gateway, "ranklet_continuations_total") - continued - moved
    assert STREAMS - moved <= again <= STREAMS, "a call that had not arrived at the second is sent again as it was"


def target(service: Service, **labels: str) -> str:
    (found,) = (each["targets"][0] for each in service.targets() if labels.items() <= each["labels"].items())
    return str(found)


def count(target: str, name: str) -> float:
    return summed_samples([target], {}).get(name, 0.0)
