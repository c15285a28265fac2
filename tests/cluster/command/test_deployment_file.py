"""`ranklet up` opens admin calls only on loopback, and refuses unknown router settings before it starts anything."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.command import cli
from ranklet.cluster.command.deployment_file import check_router, drain_time_s, read_configuration, with_open_admin
from tests.cluster.service import Service, local_configuration, own_configuration


def deployed(model_dir: Path, adapters_dir: Path, host: str | None, security: Any) -> Any:
    content = local_configuration(model_dir, adapters_dir)
    content["http_options"] = {} if host is None else {"host": host}
    if security is not None:
        content["applications"][0]["args"]["security"] = security
    before = repr(content)
    opened = with_open_admin(content)
    assert repr(content) == before, "the caller's configuration was changed"
    assert with_open_admin(opened) == opened
    return opened["applications"][0]["args"].get("security")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", None])
@pytest.mark.parametrize("security", [None, {}, {"adapter_roots": ["/a"]}])
def test_admin_calls_are_open_on_loopback(host: str | None, security: Any, model_dir: Path, adapters_dir: Path) -> None:
    assert deployed(model_dir, adapters_dir, host, security) == {**(security or {}), "open_admin": True}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.example.com"])
def test_admin_calls_stay_as_configured_beyond_loopback(host: str, model_dir: Path, adapters_dir: Path) -> None:
    assert deployed(model_dir, adapters_dir, host, None) is None


@pytest.mark.parametrize("choice", [True, False])
def test_a_configured_choice_is_kept(choice: bool, model_dir: Path, adapters_dir: Path) -> None:
    assert deployed(model_dir, adapters_dir, "127.0.0.1", {"open_admin": choice}) == {"open_admin": choice}


def test_other_applications_are_left_alone() -> None:
    content = {"applications": [{"name": "other", "import_path": "other:app", "args": {}}]}
    assert with_open_admin(content) == content
    assert with_open_admin({}) == {}


def with_router(model_dir: Path, adapters_dir: Path, router: Any) -> dict[str, Any]:
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["deployments"][1]["request_router_config"] = router
    return content


@pytest.mark.parametrize(
    ("settings", "finding"),
    [
        ({"scatter_s": 0.1}, "scatter_s: renamed to extra_home_cost_s"),
        ({"extra_home_costs": 0.1}, "did you mean extra_home_cost_s?"),
        ({"extra_home_cost_s": -1}, "expected a number"),
        (["extra_home_cost_s"], "expected a map"),
    ],
)
def test_an_unusable_router_setting_is_refused_before_ray_starts(
    settings: Any, finding: str, model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(with_router(model_dir, adapters_dir, {"request_router_kwargs": settings})))
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        assert cli.main(["up", str(config), "--temp-dir", folder]) == 1
        assert not list(Path(folder).iterdir())
    output = capsys.readouterr()
    assert finding in output.err
    assert "Replica: request_router_kwargs" in output.err
    assert "starting Ray" not in output.out
    assert cli.main(["doctor", str(config)]) == 1
    assert "router" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("deployment", "content", "sentence"),
    [
        (0, {"adaptors": {}}, "user_config of the Gateway: unknown key 'adaptors' (did you mean 'adapters'?)"),
        (0, {"tokens_per_minute": {"free-*": 0}}, "tokens_per_minute.free-*: expected a number greater than or equal"),
        (1, {"adapters": 5}, "user_config of the Replica: adapters: expected a valid dictionary, got 5"),
    ],
)
def test_a_faulty_user_config_is_refused_before_ray_starts(
    deployment: int, content: Any, sentence: str, model_dir: Path, adapters_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    configuration = local_configuration(model_dir, adapters_dir)
    configuration["applications"][0]["deployments"][deployment]["user_config"] = content
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(configuration))
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        assert cli.main(["up", str(config), "--temp-dir", folder]) == 1
        assert not list(Path(folder).iterdir())
    output = capsys.readouterr()
    assert sentence in output.err
    assert output.err.count("\n") == 1
    assert "starting Ray" not in output.out


def test_a_faulty_file_of_loaded_adapters_is_refused_before_ray_starts(
    model_dir: Path, adapters_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(own_configuration(model_dir, adapters_dir, tmp_path)))
    book = tmp_path / "adapters" / ".ranklet" / "adapters.json"
    book.parent.mkdir()
    book.write_text("{")
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        assert cli.main(["up", str(config), "--temp-dir", folder]) == 1
    output = capsys.readouterr()
    assert f"{book}: expected the file that ranklet wrote, got: Invalid JSON" in output.err
    assert "starting Ray" not in output.out


def test_valid_router_settings_and_other_routers_pass(model_dir: Path, adapters_dir: Path) -> None:
    for router in (
        None,
        {"request_router_kwargs": {"extra_home_cost_s": 0.2}},
        {"request_router_class": "other:Router", "request_router_kwargs": {"anything": 1}},
    ):
        assert check_router(with_router(model_dir, adapters_dir, router)) == []


def test_a_local_service_lets_its_machine_unload_adapters(service: Service) -> None:
    assert service.http.delete("/v1/adapters/no-such").status_code == 404


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_relative_paths_become_absolute_and_others_stay(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to(model_dir)
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    content = local_configuration(model_dir, adapters_dir)
    application = content["applications"][0]
    application["args"] |= {
        "base": {"model_dir": "m"}, "adapters": [{"name": "a", "path": "x/a"}], "sources": {"cache_dir": "c"},
        "security": {"keys_file": "keys.yaml", "adapter_roots": ["r", "/r"]},
    }  # fmt: skip
    application["deployments"][0]["user_config"] = {"adapters": {"b": "x/b", "c": "/c"}}
    read = read_configuration(written(tmp_path, content), tmp_path)["applications"][0]
    args = read["args"]
    assert args["base"]["model_dir"] == str(tmp_path / "m")
    assert args["adapters_dir"] == str(adapters_dir)
    assert args["adapters"] == [{"name": "a", "path": str(tmp_path / "x/a")}]
    assert args["sources"]["cache_dir"] == str(tmp_path / "c")
    assert args["security"] == {"keys_file": str(tmp_path / "keys.yaml"), "adapter_roots": [str(tmp_path / "r"), "/r"]}
    assert read["deployments"][0]["user_config"]["adapters"] == {"b": str(tmp_path / "x/b"), "c": "/c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"model_dir": "org/model"}}, "base.model_dir: expected a folder, org/model does not exist in "),
        ({"base": {"model_dir": "/nowhere"}}, "base.model_dir: expected a folder, /nowhere does not exist"),
        ({"engine": {"slot": 3}}, "did you mean 'slots'?"),
        ({"security": {"keys_file": "/nowhere"}}, "security.keys_file /nowhere"),
    ],
)
def test_arguments_with_which_nothing_could_start_are_refused_at_once(
    change: dict[str, Any], message: str, model_dir: Path, adapters_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = local_configuration(model_dir, adapters_dir)
    content["applications"][0]["args"] |= change
    assert cli.main(["up", str(written(tmp_path, content)), "--temp-dir", "/tmp/ranklet-none"]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("ranklet: ")) == ("", 1)


def test_a_missing_folder_of_adapters_is_a_warning(model_dir: Path, tmp_path: Path) -> None:
    """It may be made later."""
    lines: list[str] = []
    config = written(tmp_path, local_configuration(model_dir, tmp_path / "adaptres"))
    read_configuration(config, report=lines.append)
    assert [str(tmp_path / "adaptres") in line and line.startswith("warning: adapters_dir") for line in lines] == [True]
    registry = Registry(tmp_path / "adaptres", {})
    assert "does not exist" in (registry.root_problem() or "")
    (tmp_path / "adaptres").mkdir()
    read_configuration(config, report=lines.append)
    assert (len(lines), registry.root_problem()) == (1, None)


def test_the_longest_shutdown_of_a_deployment_is_the_longest_wait() -> None:
    def configured(*deployments: dict[str, Any]) -> dict[str, Any]:
        application = {"import_path": "ranklet.cluster.app:build", "args": {}, "deployments": list(deployments)}
        return {"applications": [application]}

    def lasting(name: str, time_s: float) -> dict[str, Any]:
        return {"name": name, "graceful_shutdown_timeout_s": time_s}

    assert drain_time_s(configured()) == 600
    assert drain_time_s(configured({"name": "Gateway"}, lasting("Replica", 900))) == 900
    assert drain_time_s(configured(lasting("Gateway", 5))) == 20
    assert drain_time_s(configured(lasting("Gateway", 5), lasting("Replica", 0))) == 5
    assert drain_time_s({}) == 0
