"""Adapters are added and changed while the application runs, without new processes."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import openai
import pytest
from numpy.testing import assert_array_equal

from ranklet.replicas.adapters.reference import CONFIG_FILE, WEIGHTS_FILE
from tests.assets.oracle import Prompt
from tests.cluster.service import BASE, Service, Vectors, assert_close, eventually, vectors_of

TEXT = "The tenant shall give notice."
TEXTS: list[Prompt] = [TEXT]
SETTLES_S = 1.0  # files written longer ago are complete for the service


def test_a_new_folder_is_served_at_once(service: Service) -> None:
    assert service.post("new-folder", TEXT).status_code == 404
    shutil.copytree(service.adapters / "legal-v2", service.adapters / "new-folder")
    assert_array_equal(service.embed("new-folder", TEXT), service.embed("legal-v2", TEXT))
    assert "new-folder" in service.http.get("/v1/models").text
    shutil.rmtree(service.adapters / "new-folder")
    assert service.post("new-folder", TEXT).status_code == 404


@contextmanager
def half_copied(source: Path, target: Path) -> Iterator[Callable[[], float]]:
    """Keep writing the first half of a file; at the end, write the whole file.

    Yields:
        Returns the longest time between two writes, in seconds: a busy machine may stop the writer.
    """
    content, over = source.read_bytes(), Event()
    begun_s, longest_s = time.monotonic(), 0.0

    def pause_s() -> float:
        return max(longest_s, time.monotonic() - begun_s)

    def write() -> None:
        nonlocal begun_s, longest_s
        while not over.wait(0.02):
            began_s = time.monotonic()
            target.write_bytes(content[: len(content) // 2])
            begun_s, longest_s = began_s, pause_s()

    writer = Thread(target=write)
    writer.start()
    try:
        yield pause_s
    finally:
        over.set()
        writer.join()
        target.write_bytes(content)


def serves(service: Service, name: str, expected: Vectors) -> bool:
    answer = service.post(name, TEXT, encoding_format="base64")
    return answer.status_code == 200 and bool((vectors_of(answer) == expected).all())


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_changed_folder_is_served_after_the_last_write(service: Service, file: str) -> None:
    """The old adapter answers while a file of the new one is incomplete."""
    folder, earlier, other = (service.adapters / name for name in (f"changing-{file}", f"earlier-{file}", "medical"))
    old, new = service.embed("legal-v2", TEXT), service.embed("medical", TEXT)
    assert not (old == new).all()
    for copy in (folder, earlier):
        shutil.copytree(service.adapters / "legal-v2", copy)
        assert_array_equal(service.embed(copy.name, TEXT), old)
    with half_copied(other / file, folder / file) as pause_s:
        (complete,) = {CONFIG_FILE, WEIGHTS_FILE} - {file}
        shutil.copy(other / complete, folder)
        shutil.copytree(other, earlier, dirs_exist_ok=True)

        def old_is_served() -> bool:
            """Return whether the old adapter answers, or the writer paused for so long that it seemed to be done."""
            return serves(service, folder.name, old) or pause_s() >= SETTLES_S

        def earlier_change_is_served() -> bool:
            """By then, the service has checked the files of both folders since the changes began."""
            assert old_is_served()
            return bool((service.embed(earlier.name, TEXT) == new).all())

        eventually("the change of the other folder is served", earlier_change_is_served, poll_s=0.01)
        assert old_is_served()
    eventually("the new revision is served", lambda: serves(service, folder.name, new))
    for copy in (folder, earlier):
        shutil.rmtree(copy)


@pytest.mark.parametrize("form", ["map", "list"])
def test_user_config_changes_the_list_without_a_restart(service: Service, adapters_dir: Path, form: str) -> None:
    before = {name: service.processes(name) for name in ("Gateway", "Replica")}
    name, path = f"from-user-config-{form}", str(adapters_dir / "support-rs")
    service.deploy({"adapters": {name: path} if form == "map" else [{"name": name, "path": path}]})
    eventually("the new adapter is served", lambda: service.post(name, TEXT).status_code == 200)
    assert_close(service.embed(f"{BASE}:{name}", TEXT), service.expected("support-rs", TEXTS))
    assert name in service.http.get("/v1/models").text
    service.deploy({"adapters": {}})
    eventually("the adapter is no longer served", lambda: service.post(name, TEXT).status_code == 404)
    assert {name: service.processes(name) for name in ("Gateway", "Replica")} == before


def test_requests_over_the_quota_of_an_adapter_are_refused_with_retry_after(service: Service) -> None:
    service.deploy({"tokens_per_minute": {"support-*": 60}})
    try:
        eventually("the quota is in force", lambda: service.post("support-rs", TEXT).status_code == 429)
        refused = service.post("support-rs", TEXT)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with service.openai() as client, pytest.raises(openai.RateLimitError, match="60 tokens a minute"):
            client.embeddings.create(model="support-rs", input=TEXT)
        assert service.post("legal-v2", TEXT).status_code == 200
        counted = service.samples("gateway", by="adapter", adapter="support-rs")
        assert counted["ranklet_quota_rejections_total"] >= 3
    finally:
        service.deploy({})
    eventually("the quota is lifted", lambda: service.post("support-rs", TEXT).status_code == 200)


def test_wrong_entries_of_user_config_refuse_their_own_requests_only(service: Service, adapters_dir: Path) -> None:
    good = str(adapters_dir / "support-rs")
    service.deploy({"adapters": {"good": good, "up": f"{good}/../legal-v2", "gone": f"{good}-gone", "a*b": good}})
    eventually("the good one is served", lambda: service.post("good", TEXT).status_code == 200)
    answers = {name: service.post(name, TEXT) for name in ("up", "gone", "a*b")}
    codes = {name: (answer.status_code, answer.json()["error"]["code"]) for name, answer in answers.items()}
    assert codes == {
        "up": (400, "invalid_adapter"),
        "gone": (404, "adapter_not_found"),
        "a*b": (400, "invalid_adapter"),
    }
    service.deploy({"adapters": {}})
