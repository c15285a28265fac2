"""`ranklet doctor`: what is there is found, what is missing is said with what to do."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ranklet.cluster.command import cli, doctor
from ranklet.cluster.command.doctor import run_checks
from tests.cluster.service import local_configuration


def states(config: Path | None) -> dict[str, str]:
    return {finding.subject: finding.state for finding in run_checks(config)}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sound_deployment(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, local_configuration(model_dir, adapters_dir))
    assert cli.main(["doctor", str(config)]) == 0
    said = capsys.readouterr().out
    assert "legal-v2" not in said
    assert "6 adapters" in said
    found = states(config)
    assert {found[what] for what in ("torch", "ray", "C compiler", "base.model_dir", "adapters_dir")} == {"ok"}
    for finding in run_checks(config):
        assert (finding.state == "ok") != bool(finding.remedy), finding


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"base": {"model_dir": "/nowhere"}}, "base.model_dir"),
        ({"adapters_dir": "/nowhere"}, "adapters_dir"),
        ({"security": {"keys_file": "/nowhere"}}, "security.keys_file"),
        ({"slots": 3}, "args."),
        ({"engine": {"slots": 0}}, "args."),
    ],
)
def test_each_fault_is_found(
    change: dict[str, object], what: str, model_dir: Path, adapters_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["args"] |= change
    config = written(tmp_path, content)
    assert cli.main(["doctor", str(config)]) == 1
    assert [name for name, state in states(config).items() if state == "fail"] == [what]
    capsys.readouterr()


@pytest.mark.parametrize("content", [None, [], {"applications": []}, {"applications": [{"name": "x"}]}])
def test_a_file_of_another_form_is_said(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(written(tmp_path, content))]) == 1
    assert cli.main(["doctor", str(tmp_path / "absent.yaml")]) == 1
    capsys.readouterr()


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert doctor.check_port(port, "HTTP").state == "warn"
    assert doctor.check_port(port, "HTTP").state == "ok"


def test_what_a_container_often_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = states(None)
    assert (found["open files"], found["/dev/shm"], found["C compiler"]) == ("warn", "warn", "fail")
