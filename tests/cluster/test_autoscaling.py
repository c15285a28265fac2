"""The number of replicas follows the load, and no request fails when it changes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranklet.cluster.autoscaling import BUSY, FIRST_TOKEN_S, KV_USED, WAIT_S, by_work, wanted_replicas
from ranklet.cluster.command.local_cluster import LocalCluster
from tests.cluster import load
from tests.cluster.service import BASE, Service, eventually, local_configuration, serving
from tests.cluster.stream_load import StreamLoad, stream_requests

PUSH_S = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


@pytest.mark.parametrize(
    ("busy", "wait_s", "wanted"),
    [
        ([0.75, 0.75], [0, 0], 2),
        ([1, 1], [0.1, 0.1], 2.67),
        ([1, 1], [9, 9], 4),
        ([0.1, 0.2], [0, 0], 0.4),
        ([], [], 2),
    ],
)
def test_the_policy_follows_utilisation_and_wait(busy: list[float], wait_s: list[float], wanted: float) -> None:
    metrics = {BUSY: dict(enumerate(busy)), WAIT_S: dict(enumerate(wait_s))}
    ctx: Any = SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2, policy_state={}
    )
    assert by_work(ctx)[0] == pytest.approx(wanted, rel=0.01)
    ctx.aggregated_metrics = None
    assert by_work(ctx)[0] == 2


@pytest.mark.parametrize(
    ("further", "wanted"),
    [
        ({}, 1.0),
        ({KV_USED: [0.2, 0.3]}, 1.0),
        ({KV_USED: [0.9, 0.94]}, 2.3),
        ({FIRST_TOKEN_S: [1.5]}, 3.0),
        ({FIRST_TOKEN_S: [0.2, 0.3], KV_USED: [0.4, 0.4]}, 1.0),
        ({FIRST_TOKEN_S: [30.0]}, 4.0),
    ],
)
def test_the_policy_follows_pages_and_first_tokens_of_texts(further: dict[str, list[float]], wanted: float) -> None:
    measured = {BUSY: [0.375, 0.375], WAIT_S: [0.0, 0.0], **further}
    by_replica = {key: dict(enumerate(values)) for key, values in measured.items()}
    assert wanted_replicas(by_replica, current=2, target=2) == pytest.approx(wanted)


@pytest.mark.usefixtures("runs_ray")
def test_replicas_start_under_load_and_stop_without_it(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["args"]["engine"]["kv_cache_bytes"] = 16 << 20
    replica = content["applications"][0]["deployments"][1]
    replica["graceful_shutdown_timeout_s"] = 0.5  # texts that take longer go on in the other replica
    del replica["num_replicas"]
    replica["autoscaling_config"] = {
        "min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 2,
        "metrics_interval_s": 1, "policy": {"policy_function": "ranklet.cluster.autoscaling:by_work"},
    }  # fmt: skip
    cluster = LocalCluster(http_port=0, report=print, environment=PUSH_S)
    with serving(content, tmp_path, cluster) as service:
        assert len(service.processes("Replica")) == 1
        streams = StreamLoad(service.url, stream_requests((BASE, "legal-v2"), 4, 200))
        with streams.running(4):
            seen = load.run_under_load(service, lambda: _more(service))
            assert (seen["wrong"], seen["refused"]) == (0, 0)
            assert seen["right"] > 20
            eventually("one replica again", lambda: len(service.processes("Replica")) == 1)
        assert set(streams.verdicts) == {"right"}, (streams.verdicts, streams.errors)
        assert service.embed("legal-v2", "still here").shape == (1, 128)


def _more(service: Service) -> None:
    """Send long requests too, until there is a second replica."""
    texts = [f"{number} {load.LONG_TEXT}" for number in range(60)]
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            assert service.post("legal-v2", texts, encoding_format="base64").status_code == 200

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            eventually("a second replica", lambda: len(service.processes("Replica")) == 2)
        finally:
            enough.set()
        for one in asking:
            one.result()
