"""The checks of published clients: their pins are exact, their reports are read, and the last results are current."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.report import RESULTS
from tests.clients.__main__ import main
from tests.clients.clients import CLIENTS, HERE, Client
from tests.clients.environments import version
from tests.clients.outcome import read_report
from tests.needs import needs

PYTHON_CHECKS = """
import pytest

def test_passes(record_property):
    record_property("largest error", 0.25)

@pytest.mark.parametrize("value", [0.5, 0.125])
def test_measures(record_property, value):
    record_property("largest error", value)

@pytest.mark.parametrize("asked", ["tools", "n"])
def test_refused_by_name(asked):
    assert asked == "tools"

def test_fails_early(missing_fixture): ...

@pytest.mark.skip
def test_does_not_apply(): ...
"""
NODE_CHECKS = """
import assert from "node:assert";
import { test } from "node:test";
test("passes", () => {});
test("refused_by_name[tools]", () => {});
test("refused_by_name[n]", () => assert.fail());
test("does not apply", { skip: true }, () => {});
"""


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_versions_of_a_client_are_pinned(client: Client) -> None:
    assert client.checks.exists()
    assert version(client)
    if client.is_node:
        text = client.pins.read_text(encoding="utf-8")
        (wanted,) = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"].items()
        assert wanted == (client.package, version(client))
        assert "resolved" not in text, "the lock names a registry: npm install --omit-lockfile-registry-resolved"
        return
    pins = [line.split("==") for line in client.pins.read_text(encoding="utf-8").splitlines()]
    assert all(len(pin) == 2 and all(pin) for pin in pins)
    assert {"pytest", client.package} <= {name for name, _ in pins}
    assert "torch" not in {name for name, _ in pins}


def test_every_file_of_checks_belongs_to_a_client() -> None:
    assert {path for path in HERE.iterdir() if path.stem.endswith("_checks")} == {client.checks for client in CLIENTS}


def test_an_unknown_client_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clients", "litelm"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "unknown client litelm" in (shown := capsys.readouterr().err)
    assert all(client.name in shown for client in CLIENTS)


def test_a_report_of_pytest_is_read(tmp_path: Path) -> None:
    checks, report = tmp_path / "some_checks.py", tmp_path / "report.xml"
    checks.write_text(PYTHON_CHECKS)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(tmp_path)]
    options = ["-p", "no:cacheprovider", f"--junitxml={report}", str(checks)]
    subprocess.run([*command, *options], check=False, capture_output=True, timeout=60)
    outcome = read_report(report, "some", "1.0", 2.0)
    assert (outcome.passed, outcome.skipped, outcome.refused) == (4, 1, ("tools",))
    assert outcome.failed == ("test_refused_by_name[n]", "test_fails_early")
    assert not outcome.is_good
    assert outcome.row()["measured"] == "largest error 5.0e-01"


@needs("node")
def test_a_report_of_node_is_read(tmp_path: Path) -> None:
    checks, report = tmp_path / "some_checks.mjs", tmp_path / "report.xml"
    checks.write_text(NODE_CHECKS)
    options = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
    subprocess.run(["node", "--test", *options, str(checks)], check=False, capture_output=True, timeout=60)
    outcome = read_report(report, "some", "1.0", 2.0)
    assert (outcome.passed, outcome.skipped, outcome.refused) == (2, 1, ("tools",))
    assert outcome.failed == ("refused_by_name[n]",)


def test_the_results_are_of_these_versions_and_without_failures() -> None:
    rows = json.loads((RESULTS / "clients-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["client"]: row["version"] for row in rows} == {client.name: version(client) for client in CLIENTS}
    assert [row["client"] for row in rows if row["failed"] or not row["passed"]] == []
