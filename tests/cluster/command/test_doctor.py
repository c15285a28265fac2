"""`ranklet doctor` reports each fault of a machine or of a deployment's file, with a remedy."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ranklet.cluster.command import cli, machine_checks
from ranklet.cluster.command.doctor import run_checks
from ranklet.cluster.command.haproxy import PROGRAM_VARIABLE
from ranklet.cluster.command.machine_checks import check_port
from ranklet.cluster.command.token_check import check_manifest_token, check_token
from ranklet.cluster.datapath import FAST_PATH
from tests.cluster.service import ROOT, local_configuration, own_configuration


def states(config: Path | None) -> dict[str, str]:
    return {finding.subject: finding.state for finding in run_checks(config)}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sound_deployment_passes(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, local_configuration(model_dir, adapters_dir))
    assert cli.main(["doctor", str(config)]) == 0
    output = capsys.readouterr().out
    assert "legal-v2" not in output
    assert "6 adapters" in output
    found = states(config)
    assert {found[subject] for subject in ("torch", "ray", "C compiler", "base.model_dir", "adapters_dir")} == {"ok"}
    for finding in run_checks(config):
        assert (finding.state == "ok") != bool(finding.remedy), finding


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"base": {"model_dir": "/nowhere"}}, "base.model_dir"),
        ({"adapters_dir": "/nowhere"}, "adapters_dir"),
        ({"security": {"keys_file": "/nowhere"}}, "security.keys_file"),
        ({"security": {"keys_file": "README.md"}}, "security.keys_file"),
        ({"slots": 3}, "args."),
        ({"engine": {"slots": 0}}, "args."),
    ],
)
def test_each_fault_is_found(
    change: dict[str, object], subject: str, model_dir: Path, adapters_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["args"] |= change
    config = written(tmp_path, content)
    assert cli.main(["doctor", str(config)]) == 1
    assert [name for name, state in states(config).items() if state == "fail"] == [subject]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("deployment", "change", "subject", "says"),
    [
        (0, {"user_config": {"adaptors": {}}}, "user_config", "did you mean 'adapters'"),
        (0, {"user_config": {"tokens_per_minute": {"free-*": 0}}}, "user_config", "got 0"),
        (1, {"user_config": {"tokens_per_minute": {"free-*": 5}}}, "user_config", "user_config of the Replica"),
        (1, {"name": "replica"}, "config.yaml", "expected Gateway or Replica, got 'replica'"),
        (1, {"max_ongoing_requests": 0}, "config.yaml", "max_ongoing_requests"),
    ],
)
def test_each_fault_of_a_deployment_with_which_it_would_not_start_is_found(
    deployment: int, change: dict[str, object], subject: str, says: str, model_dir: Path, adapters_dir: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["deployments"][deployment] |= change
    config = written(tmp_path, content)
    assert cli.main(["doctor", str(config)]) == 1
    (failed,) = [finding for finding in run_checks(config) if finding.state == "fail"]
    assert (subject in failed.subject, says in failed.value) == (True, True), failed
    capsys.readouterr()


def test_a_folder_in_user_config_that_cannot_be_served_is_a_warning(
    model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    content = local_configuration(model_dir, adapters_dir)
    adapters = {"good": str(adapters_dir / "medical"), "gone": "/nowhere", ".dot": str(adapters_dir / "medical")}
    content["applications"][0]["deployments"][0]["user_config"] = {"adapters": adapters}
    found = [finding for finding in run_checks(written(tmp_path, content)) if "user_config of" in finding.subject]
    assert [finding.state for finding in found] == ["warn", "warn"]
    values = "\n".join(finding.value for finding in found)
    assert ("/nowhere does not exist" in values, "'.dot'" in values) == (True, True)


def test_settings_that_ray_serve_would_ignore_are_warnings(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    content = local_configuration(model_dir, adapters_dir)
    content["http_option"] = content["applications"][0]["deployments"][0]["user_confg"] = {}
    found = {each.subject: each.value for each in run_checks(written(tmp_path, content)) if each.state == "warn"}
    assert "did you mean 'http_options'" in found["'http_option' of the file"]
    assert "did you mean 'user_config'" in found["'user_confg' of the Gateway"]


def test_a_faulty_file_of_loaded_adapters_fails(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = own_configuration(model_dir, adapters_dir, tmp_path)
    config = written(tmp_path, content)
    book = tmp_path / "adapters" / ".ranklet" / "adapters.json"
    book.parent.mkdir()
    book.write_text('{"version": 1, "adapters": {"medical": {"path": "/x"}}}')
    (finding,) = [each for each in run_checks(config) if each.subject == "adapters_dir/.ranklet"]
    assert (finding.state, finding.value) == ("ok", "1 adapters loaded or unloaded by name")
    book.write_text('{"version": 1, "adapters": {"medical": {"pined": true}}}')
    assert cli.main(["doctor", str(config)]) == 1
    (failed,) = [each for each in run_checks(config) if each.state == "fail"]
    assert (failed.subject, str(book) in failed.value, "medical" in failed.value) == (
        "adapters_dir/.ranklet",
        True,
        True,
    )
    capsys.readouterr()


@pytest.mark.parametrize("content", [None, [], {"applications": []}, {"applications": [{"name": "x"}]}])
def test_a_file_of_another_form_fails(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(written(tmp_path, content))]) == 1
    assert cli.main(["doctor", str(tmp_path / "absent.yaml")]) == 1
    capsys.readouterr()


def test_a_port_in_use_is_reported() -> None:
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert check_port(port, "HTTP").state == "warn"
    assert check_port(port, "HTTP").state == "ok"


@pytest.mark.parametrize(
    ("host", "variables", "state", "value"),
    [
        ("0.0.0.0", {}, "fail", "off"),
        ("0.0.0.0", {"RAY_AUTH_MODE": "disabled"}, "fail", "off"),
        ("10.0.0.7", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, "fail", "off"),
        ("gateway.example.com", {}, "fail", "off"),
        ("127.0.0.1", {}, "warn", "off"),
        ("localhost", {}, "warn", "off"),
        ("0.0.0.0", {"RAY_AUTH_MODE": "token"}, "fail", "no token"),
        ("0.0.0.0", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "fail", "no token"),
        ("0.0.0.0", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "ok", "RAY_AUTH_TOKEN"),
        ("0.0.0.0", {"RAY_AUTH_TOKEN": "secret"}, "ok", "by default"),
    ],
)
def test_a_cluster_beyond_loopback_without_a_token_fails(
    host: str, variables: dict[str, str], state: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    finding = check_token(host, variables)
    assert finding.state == state
    assert value in finding.value
    assert "secret" not in finding.value
    assert (state == "ok") != bool(finding.remedy)


def test_ray_finds_a_token_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret\n")
    assert check_token("0.0.0.0", {}).state == check_token("0.0.0.0", {"RAY_AUTH_MODE": "token"}).state == "ok"


def test_a_file_that_opens_http_to_the_network_needs_a_token(
    model_dir: Path, adapters_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    content = local_configuration(model_dir, adapters_dir)
    content["http_options"]["host"] = "0.0.0.0"
    config = written(tmp_path, content)
    assert cli.main(["doctor", str(config)]) == 0, "`ranklet up` makes a token"
    assert cli.main(["doctor", str(config), "--ray-start"]) == 1
    assert states(config)["Ray's token"] == "fail"
    content["applications"][0]["args"]["security"] = {"open_ray": True}
    assert states(written(tmp_path, content))["Ray's token"] == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert cli.main(["doctor", str(config), "--ray-start"]) == 0
    assert "secret" not in capsys.readouterr().out


def test_what_ranklet_up_does_is_no_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FAST_PATH:
        monkeypatch.delenv(name, raising=False)
    cli.main(["doctor"])
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in capsys.readouterr().out
    cli.main(["doctor", "--ray-start"])
    assert "      export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 before" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["20", "80"])
def test_what_is_to_be_copied_is_on_one_line(
    columns: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    config = tmp_path / ("a-long-name-" * 10) / "config.yaml"
    cli.main(["doctor", str(config), "--ray-start"])
    lines = capsys.readouterr().out.splitlines()
    (finding,) = [each for each in run_checks(None) if each.subject == "data path"]
    assert f"      {finding.remedy}" in lines
    assert any(str(config) in line for line in lines)


def test_too_few_gpus_are_said_with_both_numbers(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["deployments"][1]["ray_actor_options"] = {"num_cpus": 0, "num_gpus": 1}
    config = written(tmp_path, content)
    assert cli.main(["doctor", str(config)]) == 1
    assert "need 2 GPUs (Replica: 2 x 1), there are 1" in capsys.readouterr().out
    assert cli.main(["doctor", str(config), "--ray-start"]) == 0, "other machines may have more"
    capsys.readouterr()


def test_a_folder_that_can_only_be_read_is_a_warning(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write to every folder
    config = written(tmp_path, local_configuration(model_dir, adapters_dir))
    assert cli.main(["doctor", str(config)]) == 0
    (finding,) = [each for each in run_checks(config) if each.subject == "adapters_dir"]
    assert (finding.state, "6 adapters; read-only" in finding.value) == ("warn", True)
    capsys.readouterr()


def test_the_shipped_manifest_is_sound_and_fails_without_its_token() -> None:
    text = (ROOT / "deploy" / "kuberay.yaml").read_text()
    assert states(ROOT / "deploy" / "kuberay.yaml")["Ray's token"] == "ok"
    cluster = yaml.safe_load(text.partition("\n---\n")[0])["spec"]["rayClusterConfig"]
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": "RAY_AUTH_MODE", "value": "disabled"}]
    assert check_manifest_token(cluster).state == "fail"  # KubeRay leaves a variable that is set
    del container["env"]
    assert check_manifest_token(cluster).state == "ok"
    del cluster["authOptions"]
    assert check_manifest_token(cluster).state == "fail"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [each for group in groups for each in group["template"]["spec"]["containers"]]
    mode = {"name": "RAY_AUTH_MODE", "value": "token"}  # for operators that do not know authOptions
    secret = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ray-token", "key": "auth_token"}}}
    for number, each in enumerate(containers):
        each["env"] = [mode, secret]
        assert check_manifest_token(cluster).state == ("ok" if number == len(containers) - 1 else "fail")
    containers[-1]["env"] = [mode, {"name": "RAY_AUTH_TOKEN", "value": "secret"}]
    found = check_manifest_token(cluster)
    assert (found.state, "secret" in found.value) == ("warn", False)
    del cluster["headGroupSpec"]["template"]
    assert check_manifest_token(cluster).state == "fail"  # KubeRay itself refuses a group without a template


def test_a_haproxy_that_splices_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FAST_PATH.items():
        monkeypatch.setenv(name, value)
    (finding,) = [each for each in run_checks(None) if each.subject == "data path"]
    assert (finding.state, finding.value) == ("warn", "HAProxy, without limits on clients")
    monkeypatch.setenv(PROGRAM_VARIABLE, "/usr/local/bin/haproxy")
    assert states(None)["data path"] == "ok"


def test_a_ray_that_no_longer_reads_a_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(None)["Ray Serve's variables"] == "ok"
    monkeypatch.setattr(machine_checks, "SERVE_VARIABLES", ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_RENAMED"))
    (finding,) = [each for each in run_checks(None) if each.subject == "Ray Serve's variables"]
    assert (finding.state, finding.value) == ("fail", "Ray does not read RAY_SERVE_RENAMED")


def test_a_ray_without_its_list_of_variables_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert states(None)["Ray Serve's variables"] == "warn"


def test_faults_that_are_common_in_containers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = states(None)
    assert (found["open files"], found["/dev/shm"], found["C compiler"]) == ("warn", "warn", "fail")
