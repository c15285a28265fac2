"""The same application behind Serve's own proxy, whose transport, threads and event loops differ from the fast path."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ranklet.cluster.keys import new_key
from ranklet.cluster.local import LocalCluster
from tests.cluster import load
from tests.cluster.service import BASE, Service, assert_close, local_configuration, serving


@pytest.fixture(scope="module")
def plain(model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("plain")
    adapters = folder / "adapters"
    shutil.copytree(adapters_dir, adapters)
    content = local_configuration(model_dir, adapters)
    (admin, entry), (team, other) = (
        new_key("ops", admin=True, adapters=()),
        new_key("team", admin=False, adapters=("legal-*",)),
    )
    keys = folder / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json"), other.model_dump(mode="json")]}))
    (folder / "team").write_text(team)
    content["applications"][0]["args"]["security"] = {"keys_file": str(keys)}
    cluster = LocalCluster(proxy="serve", http_port=0, report=print)
    with serving(content, folder, cluster) as service:
        service.http.headers["authorization"] = f"Bearer {admin}"
        yield service


def test_keys_say_who_may_do_what(plain: Service) -> None:
    """Health and metrics' targets are for everybody, the rest for those who have a key for it."""
    team = (plain.adapters.parent / "team").read_text()
    without, limited = {"authorization": ""}, {"authorization": f"Bearer {team}"}
    ask = {"model": "legal-v2", "input": "a text"}
    for headers, status in ((without, 401), ({"authorization": "Bearer no"}, 401), (limited, 200)):
        assert plain.http.post("/v1/embeddings", json=ask, headers=headers).status_code == status
    others = plain.http.post("/v1/embeddings", json={**ask, "model": "medical"}, headers=limited)
    assert (others.status_code, others.json()["error"]["code"]) == (403, "forbidden")
    cards = plain.http.get("/v1/models", headers=limited).json()["data"]
    assert [card["id"] for card in cards] == ["legal-v2"]
    for method, path in (
        ("GET", "/v1/adapters"),
        ("POST", "/v1/load_lora_adapter"),
        ("DELETE", "/v1/adapters/medical"),
    ):
        assert plain.http.request(method, path, headers=without).status_code == 401
        assert plain.http.request(method, path, headers=limited).status_code == 403
    assert plain.http.get("/v1/adapters").status_code == 200
    for path in ("/health", "/ready", "/metrics/targets"):
        assert plain.http.get(path, headers=without).status_code == 200
    for log in Path(plain.cluster.state.temp_dir).rglob("*.log"):
        assert team not in log.read_text(errors="replace"), log


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
