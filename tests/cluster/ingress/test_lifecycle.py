"""Adapters are loaded, replaced and unloaded by name while requests run."""

import json
import shutil
from collections import Counter
from pathlib import Path
from threading import Event, Thread
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from ranklet.cluster.command.cli import main
from ranklet.replicas.adapters.revision import revision_of
from tests.assets.broken import BROKEN
from tests.cluster.load import LONG_TEXT
from tests.cluster.service import BASE, Service, Vectors, assert_close, eventually

TEXT = "The tenant shall give notice."


def load(service: Service, **fields: object) -> httpx.Response:
    return service.http.post("/v1/load_lora_adapter", json=fields)


def unload(service: Service, name: str) -> httpx.Response:
    return service.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def are_close(one: Vectors, other: Vectors) -> bool:
    return bool(np.abs(one - other).max() < 1e-5)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def source(service: Service) -> str:
    """A folder that is not served until it is loaded by name."""
    folder = service.adapters / ".sources" / "legal"
    shutil.copytree(service.adapters / "legal-v2", folder, dirs_exist_ok=True)
    return str(folder)


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_adapters_are_loaded_and_unloaded_by_the_calls_of_vllm_and_sglang(
    service: Service, source: str, prefix: str
) -> None:
    answer = service.http.post(f"{prefix}/load_lora_adapter", json={"lora_name": "by-name", "lora_path": source})
    assert answer.status_code == 200, answer.text
    card = answer.json()
    assert (card["state"], card["verified"], card["rank"]) == ("ready", True, 64)
    assert "q_proj" in card["target_modules"]
    assert_close(service.embed("by-name", TEXT), service.embed("legal-v2", TEXT))
    for name in ("by-name", "legal-v2"):  # of the same content
        assert_close(service.embed(f"{name}@{card['revision']}", TEXT), service.embed("legal-v2", TEXT))
        assert service.http.get(f"/v1/models/{name}@{card['revision']}").json()["id"] == name
    for unknown in ("by-name@0123456789abcdef", f"by-name@0123456789abcdef@{card['revision']}"):
        assert code(service.post(unknown, TEXT)) == (404, "model_not_found")
        assert code(service.http.get(f"/v1/models/{unknown}")) == (404, "model_not_found")
    error = service.post(None, TEXT, lora_path="by-name@0123456789abcdef").json()["error"]
    assert (error["param"], error["message"].partition(":")[0]) == ("lora_path", "lora_path"), error
    gone = service.http.post(f"{prefix}/unload_lora_adapter", json={"lora_name": "by-name"})
    assert (gone.status_code, gone.json()["state"]) == (200, "unloaded")
    assert code(service.post("by-name", TEXT)) == (404, "model_not_found")
    assert code(unload(service, "by-name")) == (404, "model_not_found")


def test_the_rest_calls_show_where_an_adapter_is(service: Service, source: str) -> None:
    made = service.http.post("/v1/adapters", json={"name": "rest", "path": source, "pinned": True})
    assert made.status_code == 200, made.text
    shown = service.http.get("/v1/adapters/rest").json()
    assert shown["state"] == "ready"
    assert (shown["pinned"], shown["rank"], shown["references"]) == (True, 64, 0)

    def everywhere() -> bool:
        tiers = [each["tier"] for each in service.http.get("/v1/adapters/rest").json()["replicas"]]
        return tiers == ["gpu", "gpu"]

    eventually("a pinned adapter is in a slot of each replica", everywhere)
    pinned = service.samples("replica", adapter_name="rest", pinned="true", level="gpu")
    assert pinned["vllm:lora_adapter_loaded"] == 2, "one on each replica"
    names = {card["name"] for card in service.http.get("/v1/adapters").json()["data"]}
    assert {"rest", "legal-v2", "medical"} <= names
    assert service.http.delete("/v1/adapters/rest").status_code == 200
    assert code(service.http.get("/v1/adapters/rest")) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_name": "a/../b", "lora_path": "x"}, (400, "invalid_request_error")),
        ({"lora_name": BASE, "lora_path": "legal-v2", "load_inplace": True}, (400, "invalid_request_error")),
        ({"lora_name": "x", "lora_path": "/etc"}, (400, "invalid_request_error")),
        ({"lora_name": "x", "lora_path": "../../etc"}, (404, "adapter_not_found")),
        ({"lora_name": "x", "lora_path": "no-such"}, (404, "adapter_not_found")),
        ({"lora_name": "x", "lora_path": "s3://bucket/x"}, (400, "invalid_request_error")),
        ({"lora_path": "x"}, (400, "invalid_request_error")),
        ({"lora_name": 3, "lora_path": "x"}, (400, "invalid_request_error")),
        ({"lora_name": "x", "lora_path": "legal-v2", "inplace": True}, (400, "invalid_request_error")),
        ({"lora_name": "medical", "lora_path": "legal-v2"}, (409, "adapter_exists")),
    ],
)
def test_wrong_loads_are_refused(service: Service, fields: dict[str, object], expected: tuple[int, str]) -> None:
    assert code(load(service, **fields)) == expected


def test_a_broken_replacement_is_refused_and_the_old_adapter_stays(service: Service, model_dir: Path) -> None:
    BROKEN["nan"].make(model_dir, service.adapters / ".sources" / "nan")
    answer = load(service, lora_name="medical", lora_path=".sources/nan", load_inplace=True)
    assert code(answer) == (400, "invalid_adapter")
    assert "NaN" in answer.json()["error"]["message"]
    assert service.post("medical", TEXT).status_code == 200
    shutil.rmtree(service.adapters / ".sources" / "nan")


def test_a_revision_depends_only_on_the_content(service: Service, source: str) -> None:
    """It is known before the first request, and copying or touching the folder does not change it."""
    copy = shutil.copytree(source, service.adapters / "copied")
    listed = {card["name"]: card for card in service.http.get("/v1/adapters").json()["data"]}
    assert (listed["copied"]["state"], listed["copied"]["revision"]) == ("registered", None)
    revision = service.http.get("/v1/adapters/copied").json()["revision"]
    assert revision == revision_of(source)
    assert service.post("copied", TEXT).headers["x-ranklet-revision"] == revision
    for path in copy.iterdir():
        path.touch()
    shown = service.http.get("/v1/adapters/copied").json()
    assert (shown["state"], shown["revision"]) == ("ready", revision)
    assert service.post("copied", TEXT).headers["x-ranklet-revision"] == revision
    shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["org/legal", "org/legal@v1", "legal:v1", "legal[v2]", "cafe\u0301"])
def test_names_of_hubs_work_over_http(service: Service, source: str, name: str) -> None:
    assert load(service, lora_name=name, lora_path=source).status_code == 200
    assert_close(service.embed(name, TEXT), service.embed("legal-v2", TEXT))
    path = f"/v1/adapters/{quote(name, safe='')}"
    assert service.http.get(path).json()["state"] == "ready"
    assert service.http.get(f"/v1/models/{quote(name)}").status_code == 200
    assert service.http.delete(path).status_code == 200
    assert code(service.post(name, TEXT)) == (404, "model_not_found")


def test_a_folder_named_like_the_base_model_is_listed_as_failed(service: Service) -> None:
    shutil.copytree(service.adapters / "legal-v2", service.adapters / BASE)
    try:
        card = service.http.get(f"/v1/adapters/{BASE}").json()
        assert (card["state"], "name of the base model" in card["error"]) == ("failed", True)
        assert [each["id"] for each in service.http.get("/v1/models").json()["data"]].count(BASE) == 1
        assert "x-ranklet-revision" not in service.post(BASE, TEXT).headers
        assert code(service.post(None, TEXT, lora_path=BASE)) == (400, "invalid_adapter")
    finally:
        shutil.rmtree(service.adapters / BASE)


def test_too_many_pins_are_refused(service: Service, source: str) -> None:
    for number in range(7):
        assert load(service, lora_name=f"pin{number}", lora_path=source, pinned=True).status_code == 200
    answer = load(service, lora_name="pin7", lora_path=source, pinned=True)
    assert code(answer) == (400, "invalid_request_error")
    assert "engine.slots" in answer.json()["error"]["message"]
    assert service.post("medical", TEXT).status_code == 200, "one slot is left"
    for number in range(7):
        assert unload(service, f"pin{number}").status_code == 200


def test_while_an_adapter_is_replaced_every_request_gets_the_old_or_the_new_one(service: Service, source: str) -> None:
    """After the call has returned, requests get only the new one."""
    assert load(service, lora_name="swapped", lora_path=source).status_code == 200
    other = service.adapters / ".sources" / "medical"
    shutil.copytree(service.adapters / "medical", other, dirs_exist_ok=True)
    old, new = service.embed("legal-v2", TEXT), service.embed("medical", TEXT)
    seen: Counter[str] = Counter()
    stop = Event()

    def ask() -> None:
        while not stop.is_set():
            vector = service.embed("swapped", TEXT)
            seen["old" if are_close(vector, old) else "new" if are_close(vector, new) else "wrong"] += 1

    asking = [Thread(target=ask) for _ in range(3)]
    for each in asking:
        each.start()
    long = Thread(target=lambda: seen.update([str(service.post("swapped", [LONG_TEXT] * 60).status_code)]))
    long.start()
    try:
        for turn in range(6):
            path = str(other) if turn % 2 == 0 else source
            answer = load(service, lora_name="swapped", lora_path=path, load_inplace=True)
            assert answer.status_code == 200, answer.text
            assert_close(service.embed("swapped", TEXT), new if turn % 2 == 0 else old)
    finally:
        stop.set()
        for each in (*asking, long):
            each.join()
    assert seen["wrong"] == 0
    assert min(seen["old"], seen["new"], seen["200"]) > 0
    assert unload(service, "swapped").status_code == 200


def test_unloading_waits_for_requests_and_frees_the_memory(service: Service, source: str) -> None:
    before = service.samples("replica")["ranklet_pool_bytes"]
    assert load(service, lora_name="leaving", lora_path=source).status_code == 200
    texts = [f"{number} {LONG_TEXT}" for number in range(150)]
    answers: list[int] = []
    asked = Thread(target=lambda: answers.append(service.post("leaving", texts).status_code))
    asked.start()
    eventually("requests use it", lambda: service.http.get("/v1/adapters/leaving").json()["references"] > 0)
    assert unload(service, "leaving").status_code == 200
    asked.join()
    assert answers == [200], "the request that was sent before is answered"
    assert service.samples("replica")["ranklet_pool_bytes"] == before
    assert "leaving" not in service.http.get("/v1/adapters").text


def test_an_adapter_of_the_folder_can_be_unloaded_and_loaded_again(service: Service) -> None:
    shutil.copytree(service.adapters / "legal-v2", service.adapters / "hidden")
    assert service.post("hidden", TEXT).status_code == 200
    assert unload(service, "hidden").status_code == 200
    assert code(service.post("hidden", TEXT)) == (404, "model_not_found")
    assert "hidden" not in service.http.get("/v1/models").text
    assert load(service, lora_name="hidden").status_code == 200
    assert_close(service.embed("hidden", TEXT), service.embed("legal-v2", TEXT))
    assert unload(service, "hidden").status_code == 200
    shutil.rmtree(service.adapters / "hidden")


def test_the_adapters_command_loads_lists_and_unloads(
    service: Service, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str]:
        status = main(["adapters", *words, *(["--url", service.url] if words[0] != "verify" else [])])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, output = run("load", "cli", "--path", source)
    assert (status, "rank 64" in output) == (0, True)
    assert run("load", "other", "--path", f"{source}-gone") == (
        1,
        f"ranklet: path: expected a folder, '{source}-gone' does not exist\n",
    )
    status, output = run("list")
    assert (status, "cli" in output, "ready" in output) == (0, True, True)
    status, output = run("show", "cli")
    assert (status, json.loads(output)["state"]) == (0, "ready")
    assert run("unload", "cli")[0] == 0
    status, output = run("show", "cli")
    assert (status, "cli" in output) == (1, True)
    base = ["--model", str(service.model_dir), "--base-name", BASE]
    assert run("verify", source, *base)[0] == 0
    BROKEN["nan"].make(service.model_dir, service.adapters / ".sources" / "bad")
    status, output = run("verify", source, str(service.adapters / ".sources" / "bad"), *base)
    assert (status, "NaN" in output) == (1, True)
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
