"""The same application behind Serve's own proxy, whose transport, threads and event loops differ from the fast path."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ranklet.cluster.local import LocalCluster
from tests.cluster import load
from tests.cluster.service import BASE, Service, assert_close, local_configuration, serving


@pytest.fixture(scope="module")
def plain(model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("plain")
    cluster = LocalCluster(proxy="serve", http_port=0, report=print)
    with serving(local_configuration(model_dir, adapters_dir), folder, cluster) as service:
        yield service


def test_it_serves_and_says_which_path_it_is(plain: Service) -> None:
    versions = plain.http.get("/version").json()
    assert (versions["data_path"], versions["throughput_optimized"]) == ("serve-proxy", False)
    for adapter in (None, "legal-v2", "catalog-embed"):
        assert_close(plain.embed(adapter or BASE, "a text"), plain.expected(adapter, ["a text"]))
    assert plain.embed("medical", [f"text {number}" for number in range(1200)]).shape == (1200, 128)
    assert plain.post("legal", "a").json()["error"]["code"] == "model_not_found"
    too_large = plain.http.post("/v1/embeddings", content=b" " * 40_000_000)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")


def test_work_of_a_client_that_left_is_dropped(plain: Service) -> None:
    load.leave_early(plain)


def test_the_gateway_repeats_a_request_whose_replica_died(plain: Service) -> None:
    load.kill_with_the_request(plain)
    assert plain.samples("gateway")["ranklet_retries_total"] == 1
    load.wait_for_recovery(plain)


def test_a_replica_killed_under_load_loses_no_request(plain: Service) -> None:
    seen = load.kill_under_load(plain, victim=0)
    assert seen["wrong"] == 0
    assert seen["right"] > 20
    assert seen["refused"] < seen["right"]
