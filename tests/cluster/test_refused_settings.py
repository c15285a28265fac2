"""A slip in a setting changes nothing of a running service, and is shown everywhere; a correction heals it."""

from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.cli import main
from tests.cluster.service import Service, eventually

TEXT = "a text that is asked for again and again"


def refused(service: Service) -> dict[tuple[str, str], tuple[int, str]]:
    """Return the number of processes and the reason by role and setting, as the status page shows them."""
    listed: list[dict[str, Any]] = service.http.get("/v1/status").json()["refused_settings"]
    return {(each["role"], each["setting"]): (len(each["processes"]), each["reason"]) for each in listed}


def counts(service: Service, role: str, setting: str) -> tuple[float, float]:
    seen = service.samples(role, setting=setting)
    return seen["ranklet_setting_refused"], seen["ranklet_setting_refusals_total"]


def logged(service: Service, deployment: str, words: str) -> int:
    folder = service.cluster.state.logs
    return sum(path.read_text(errors="replace").count(words) for path in folder.glob(f"replica_*{deployment}*"))


def test_a_faulty_user_config_changes_nothing_until_a_good_one_is_deployed(
    service: Service, adapters_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: service.processes(name) for name in ("Gateway", "Replica")}
    earlier = {role: counts(service, role, "user_config") for role in ("gateway", "replica")}
    service.deploy({"adapters": {"kept": str(adapters_dir / "medical")}})
    eventually("the adapter is served", lambda: service.post("kept", TEXT).status_code == 200)
    assert refused(service) == {}

    service.deploy({"adaptors": {}}, of_replicas={"adapter": {}})
    eventually("all processes refused it", lambda: sum(count for count, _ in refused(service).values()) == 3)
    shown = refused(service)
    listed = service.http.get("/v1/adapters").json()["refused_settings"]
    assert {(each["role"], each["setting"]) for each in listed} == set(shown)
    reason = (
        "user_config of the Gateway: unknown key 'adaptors' (did you mean 'adapters'?). Known: adapters, "
        "tokens_per_minute. Correct it in the file and deploy the file again"
    )
    assert shown["gateway", "user_config"] == (1, reason)
    count, reason = shown["replica", "user_config"]
    assert (count, "did you mean 'adapters'" in reason) == (2, True)
    assert service.post("kept", TEXT).status_code == 200, "the last good content stays in force"
    assert counts(service, "gateway", "user_config") == (1, earlier["gateway"][1] + 1)
    assert counts(service, "replica", "user_config") == (2, earlier["replica"][1] + 2)
    for deployment, words in (("Gateway", "'adaptors'"), ("Replica", "'adapter'")):
        eventually("the log has it", lambda: logged(service, deployment, f"unknown key {words}") > 0)  # noqa: B023
    assert main(["adapters", "list", "--url", service.url]) == 0
    output = capsys.readouterr()
    assert "did you mean 'adapters'" in output.out + output.err

    service.deploy({"tokens_per_minute": {"kept": 0}})
    eventually("the gateway refuses a quota", lambda: "got 0" in str(refused(service)))
    eventually("the replicas are healed", lambda: set(refused(service)) == {("gateway", "user_config")})
    assert service.post("kept", TEXT).status_code == 200

    service.deploy(None)  # the file has no `user_config` any more
    eventually("nothing is refused", lambda: refused(service) == {})
    assert service.post("kept", TEXT).status_code == 404
    assert counts(service, "gateway", "user_config") == (0, earlier["gateway"][1] + 2)
    assert {name: service.processes(name) for name in before} == before


def test_a_faulty_file_of_loaded_adapters_changes_nothing_until_it_is_repaired(service: Service) -> None:
    source = str(service.adapters / "medical")
    loaded = service.http.post("/v1/adapters", json={"name": "booked", "path": source})
    assert loaded.status_code == 200, loaded.text
    book = service.adapters / ".ranklet" / "adapters.json"
    good = book.read_text()
    try:
        book.write_text(good[: len(good) // 2])  # as an editor that runs out of space
        eventually("it is refused, without a request for it", lambda: ("gateway", "adapters_file") in refused(service))
        count, reason = refused(service)["gateway", "adapters_file"]
        assert (count, str(book) in reason, "Repair it" in reason) == (1, True, True)
        assert counts(service, "gateway", "adapters_file")[0] == 1
        assert service.post("booked", TEXT).status_code == 200
        changed = service.http.post("/v1/adapters", json={"name": "other", "path": source})
        assert (changed.status_code, str(book) in changed.json()["error"]["message"]) == (500, True)
        assert service.post("other", TEXT).status_code == 404
    finally:
        book.write_text(good)
    eventually("nothing is refused", lambda: refused(service) == {})
    assert service.http.delete("/v1/adapters/booked").status_code == 200
    assert counts(service, "gateway", "adapters_file")[0] == 0
