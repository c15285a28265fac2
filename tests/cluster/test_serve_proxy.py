"""The application behind Serve's own proxy, whose transport, threads and event loops differ from those of HAProxy."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import yaml

from ranklet.cluster.access.keys import new_key
from ranklet.cluster.command.local_cluster import LocalCluster
from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from tests.cluster import load
from tests.cluster.catalog.bucket import S3Bucket, bucket
from tests.cluster.collector import Collector, collecting
from tests.cluster.service import (
    BASE,
    Service,
    assert_close,
    eventually,
    own_configuration,
    serving,
    summed_samples,
    vectors_of,
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Bucket]:
    with bucket() as made:
        yield made


@pytest.fixture(scope="module")
def plain(
    runs_ray: None, model_dir: Path, adapters_dir: Path, collector: Collector, s3: S3Bucket,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:  # fmt: skip
    folder = tmp_path_factory.mktemp("plain")
    content = own_configuration(model_dir, adapters_dir, folder)
    (admin, entry), (team, other) = (
        new_key("ops", admin=True, adapters=()),
        new_key("team", admin=False, adapters=("legal-*",)),
    )
    keys = folder / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json"), other.model_dump(mode="json")]}))
    (folder / "team").write_text(team)
    content["applications"][0]["args"]["security"] = {"keys_file": str(keys)}
    content["applications"][0]["args"]["log"] = {"requests": "all"}
    content["applications"][0]["args"]["engine"]["kv_cache_bytes"] = 64 << 20
    content["logging_config"] = {"encoding": "JSON"}
    content["applications"][0]["args"]["sources"] = {"allowed": [s3.url], "cache_dir": str(folder / "cache")}
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200",
        "FSSPEC_S3": json.dumps(s3.settings),
    }  # fmt: skip
    cluster = LocalCluster(proxy="serve", http_port=0, report=print, environment=environment)
    with serving(content, folder, cluster) as service:
        service.http.headers["authorization"] = f"Bearer {admin}"
        yield service


def test_keys_limit_models_and_admin_calls(plain: Service) -> None:
    """Health checks and metrics targets need no key."""
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
        assert plain.http.request(method, path, headers=without, json={}).status_code == 401
        assert plain.http.request(method, path, headers=limited, json={}).status_code == 403
    assert plain.http.get("/v1/adapters").status_code == 200
    for path in ("/health", "/ready", "/metrics/targets"):
        assert plain.http.get(path, headers=without).status_code == 200
    for log in Path(plain.cluster.state.temp_dir).rglob("*.log"):
        assert team not in log.read_text(errors="replace"), log


def test_a_faulty_keys_file_changes_nothing_until_it_is_corrected(plain: Service) -> None:
    keys = plain.adapters.parent / "keys.yaml"
    good = keys.read_text()

    def refused() -> list[Any]:
        found: list[Any] = plain.http.get("/v1/status").raise_for_status().json()["refused_settings"]
        return [(each["setting"], each["role"], len(each["processes"])) for each in found]

    try:
        keys.write_text(f"{good}- name: third\n")
        eventually("it is refused", lambda: refused() == [("keys_file", "gateway", 1)])
        assert plain.post("legal-v2", "a text").status_code == 200
        reason = plain.http.get("/v1/adapters").json()["refused_settings"][0]["reason"]
        assert (str(keys) in reason, "entry 3: expected sha256, got none" in reason) == (True, True)
        assert plain.samples("gateway", setting="keys_file")["ranklet_setting_refused"] == 1
    finally:
        keys.write_text(good)
    eventually("it is in force", lambda: refused() == [])


def test_a_request_is_in_the_log_and_in_its_clients_trace(plain: Service, collector: Collector) -> None:
    """Neither contains its text."""
    secret = "never to be written down"
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "request-of-mine", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    answer = plain.http.post("/v1/embeddings", json={"model": "medical", "input": secret}, headers=headers)
    headers_received = answer.headers
    assert (answer.status_code, headers_received["x-request-id"]) == (200, "request-of-mine")
    assert plain.post("no-such", secret).status_code == 404
    logs = plain.cluster.state.logs

    def lines() -> list[dict[str, Any]]:
        written = [line for path in logs.glob("replica_*Gateway*") for line in path.read_text().splitlines()]
        assert not any(secret in line for line in written)
        found: list[dict[str, Any]] = [json.loads(line) for line in written if line.startswith("{")]
        return [line for line in found if "total_ms" in line]

    eventually("both requests are in the log", lambda: {200, 404} <= {line["status"] for line in lines()})
    (line,) = [line for line in lines() if line["request_id"] == "request-of-mine"]
    assert (line["model"], line["prompts"], line["tokens"]) == ("medical", 1, answer.json()["usage"]["prompt_tokens"])
    for name in ("revision", "tier", "backend"):
        assert line[name] == headers_received[f"x-ranklet-{name}"]
    assert line["answered_by"] == headers_received["x-ranklet-replica"]
    assert 0 < line["compute_ms"] <= line["compute_ms"] + line["queue_ms"] <= line["total_ms"]

    eventually("the collector has its spans", lambda: len(collector.spans_of(trace)) == 3)
    spans = {span.name: span for span in collector.spans_of(trace)}
    whole = spans.pop("POST /v1/embeddings")
    assert whole.parent_span_id.hex() == "b7ad6b7169203331"
    assert set(spans) == {"queue", "compute"}
    assert {span.parent_span_id for span in spans.values()} == {whole.span_id}
    assert spans["queue"].end_time_unix_nano == spans["compute"].start_time_unix_nano
    assert whole.start_time_unix_nano <= spans["queue"].start_time_unix_nano
    assert spans["compute"].end_time_unix_nano <= whole.end_time_unix_nano
    assert {one.key for one in whole.attributes} > {"ranklet.model", "ranklet.answered_by", "ranklet.queue_ms"}
    assert secret not in str(whole)


def test_the_version_names_the_data_path(plain: Service) -> None:
    versions = plain.http.get("/version").json()
    assert (versions["data_path"], versions["throughput_optimized"]) == ("serve-proxy", False)
    for adapter in (None, "legal-v2", "catalog-embed"):
        assert_close(plain.embed(adapter or BASE, "a text"), plain.expected(adapter, ["a text"]))
    assert plain.embed("medical", [f"text {number}" for number in range(1200)]).shape == (1200, 128)
    assert plain.post("legal", "a").json()["error"]["code"] == "model_not_found"
    too_large = plain.http.post("/v1/embeddings", content=b" " * 40_000_000)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")


def test_an_adapter_in_an_object_store_is_served_in_one_revision_until_it_is_loaded_again(
    plain: Service, s3: S3Bucket, adapters_dir: Path
) -> None:
    url = s3.put(adapters_dir / "legal-v2", "far")
    load_it = {"lora_name": "far", "lora_path": url}
    loaded = plain.http.post("/v1/load_lora_adapter", json=load_it)
    assert loaded.status_code == 200, loaded.text
    revision = loaded.json()["revision"]
    old, new = plain.embed("legal-v2", "a text"), plain.embed("medical", "a text")
    assert (plain.embed(f"far@{revision}", "a text") == old).all()
    assert plain.http.post("/v1/load_lora_adapter", json=load_it).status_code == 409
    shown = plain.http.get("/v1/adapters/far").json()
    assert (shown["state"], shown["path"], shown["revision"]) == ("ready", f"{url}#{revision}", revision)
    assert {"far"} < {card["id"] for card in plain.http.get("/v1/models").json()["data"]}

    s3.put(adapters_dir / "medical", "far")
    assert (plain.embed("far", "a text") == old).all(), "the new revision has not been loaded"
    replaced = plain.http.post("/v1/load_lora_adapter", json={**load_it, "load_inplace": True, "pinned": True})
    assert replaced.status_code == 200, replaced.text
    answer = plain.post("far", "a text", encoding_format="base64")
    assert answer.headers["x-ranklet-revision"] == replaced.json()["revision"] != revision
    assert (vectors_of(answer) == new).all()
    assert plain.post(f"far@{revision}", "a text").status_code == 404
    eventually(
        "a slot on both replicas",
        lambda: [each["tier"] for each in plain.http.get("/v1/adapters/far").json()["replicas"]] == ["gpu", "gpu"],
    )
    files = [adapters_dir / name / file for name in ("legal-v2", "medical") for file in (CONFIG_FILE, WEIGHTS_FILE)]
    fetched = plain.samples("replica")["ranklet_source_bytes_total"]
    assert fetched == sum(file.stat().st_size for file in files), "one download for both replicas of this node"

    elsewhere = plain.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "s3://others/x"})
    assert (elsewhere.status_code, elsewhere.json()["error"]["param"]) == (400, "path")
    absent = plain.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": f"{s3.url}/absent"})
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "adapter_not_found")
    assert plain.http.delete("/v1/adapters/far").status_code == 200
    assert plain.post("far", "a text").status_code == 404


def test_work_for_a_client_that_disconnected_is_dropped(plain: Service) -> None:
    load.disconnect_early(plain)


def test_texts_of_a_gateway_that_died_end(plain: Service) -> None:
    """Through Ray's own calls, a replica is not told that the process of a caller has ended."""
    targets = [each["targets"][0] for each in plain.targets() if each["labels"]["role"] == "replica"]

    def sample(name: str, **labels: str) -> float:
        return summed_samples(targets, labels)[name]

    begun = {model: Event() for model in (BASE, "legal-v2")}

    def stream(model: str) -> None:
        long = {"model": model, "prompt": [5] * 100, "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with plain.http.stream("POST", "/v1/completions", json=long) as answer:
            for _ in answer.iter_lines():
                begun[model].set()

    (gateway,) = plain.processes("Gateway").values()
    plain.embed("legal-v2", "so that it is loaded")
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, model) for model in begun]
        assert all(each.wait(60) for each in begun.values())
        os.kill(gateway, signal.SIGKILL)
        for each in streams:
            assert isinstance(each.exception(), httpx.TransportError)
    eventually("the pages are free", lambda: sample("ranklet_kv_pages", state="used") == 0)
    assert sample("ranklet_text_cancelled_total", reason="gateway_lost") == 2
    assert sample("ranklet_generated_tokens_total") < 7000
    eventually("another gateway", lambda: plain.http.get("/ready").status_code == 200)


def test_the_gateway_repeats_a_request_whose_replica_died(plain: Service) -> None:
    load.kill_during_request(plain)
    assert plain.samples("gateway")["ranklet_retries_total"] == 1
    load.wait_for_recovery(plain)


def test_a_replica_killed_under_load_loses_no_request(plain: Service) -> None:
    seen = load.kill_replica_under_load(plain, victim=0)
    assert seen["wrong"] == 0
    assert seen["right"] > 20
    assert seen["refused"] < seen["right"]
