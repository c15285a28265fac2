"""Settings are checked, and the shipped files are valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from ranklet.cluster.app import build
from ranklet.cluster.autoscaling import by_work
from ranklet.cluster.config import AdapterList, AppArgs
from ranklet.cluster.datapath import ROUTER
from ranklet.routing.policy import Policy
from tests.ray_internals import bound_deployments

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE: dict[str, Any] = {"base": {"model_dir": "/models/base"}}


def args(**fields: Any) -> AppArgs:
    return AppArgs.model_validate({**BASE, **fields})


@pytest.mark.parametrize("file", ["config.yaml", "local.yaml"])
def test_the_shipped_files_are_valid_for_ray_and_the_builder(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    content = yaml.safe_load((DEPLOY / file).read_text())
    schema = ServeDeploySchema.model_validate(content)
    application = schema.applications[0]
    assert application.import_path == "ranklet.cluster.app:build"
    names = bound_deployments(build(AppArgs.model_validate(application.args)))
    assert {deployment.name for deployment in application.deployments} == names == {"Gateway", "Replica"}


def test_the_commented_settings_of_the_shipped_file_are_valid() -> None:
    lines = (DEPLOY / "config.yaml").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "# request_router_config:" in line)
    block = yaml.safe_load("\n".join(line.replace("# ", "", 1) for line in lines[start:]))
    assert block["request_router_config"]["request_router_class"] == ROUTER
    assert Policy(**block["request_router_config"]["request_router_kwargs"]) == Policy(), "the defaults are shown"
    autoscaling = AutoscalingConfig(**block["autoscaling_config"])
    assert autoscaling.policy.policy_function == f"{by_work.__module__}:{by_work.__name__}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_dir": "/a"}, "did you mean 'adapters_dir'"),
        ({"base": {"model_dir": "/m", "alias": ["x"]}}, "did you mean 'aliases'"),
        ({"engine": {"slot": 4}}, "did you mean 'slots'"),
        ({"engine": {"model_dir": "/m"}}, "base.model_dir"),
        ({"engine": {"slots": "many"}}, "slots"),
        ({"engine": {"slots": 0}}, "slots: expected at least 1"),
        ({"engine": {"backend": "magic"}}, "backend"),
        ({"limits": {"max_body": 5}}, "did you mean 'max_body_bytes'"),
        ({"limits": {"max_body_bytes": 0}}, "max_body_bytes"),
        ({"metrics": {"port": 1}}, "first_port"),
        ({"adapters": ["a"]}, "list of {name, path}"),
        ({"adapters": [{"name": "a"}]}, "list of {name, path}"),
        ({"base": {}}, "model_dir"),
    ],
)
def test_faulty_settings_are_refused_with_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        args(**fields)


def test_engine_settings_reach_the_engine() -> None:
    config = args(
        engine={"slots": 3, "dtype": "float32"}, base={"model_dir": "/m/x", "aliases": ["org/x"]}
    ).engine_config()
    assert (config.slots, config.dtype, config.model_dir) == (3, "float32", Path("/m/x"))
    assert {"x", "org/x"} <= set(config.base_aliases)


def test_a_request_that_would_wait_for_longer_than_gateways_do_is_refused() -> None:
    limits = {"request_timeout_s": 30}
    assert args(limits=limits).engine_config().max_wait_s == 30
    assert args(limits=limits, engine={"max_wait_s": 5}).engine_config().max_wait_s == 5


def test_adapters_may_be_a_map_or_a_list() -> None:
    listed = AdapterList.model_validate({"adapters": [{"name": "a", "path": "/x"}]})
    assert listed == AdapterList.model_validate({"adapters": {"a": "/x"}})
    assert AdapterList.model_validate({}).adapters == {}


def test_relative_paths_start_at_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = args(base={"model_dir": "m"}, adapters_dir="a", adapters={"x": "b/x"}).resolved()
    assert resolved.base.model_dir == tmp_path / "m"
    assert resolved.adapters_dir == tmp_path / "a"
    assert resolved.adapters == {"x": tmp_path / "b" / "x"}


def test_the_base_model_is_named_after_its_folder_by_default() -> None:
    assert args().base_names == ("base",)
    assert args(base={"model_dir": "/m/b", "name": "n", "aliases": ["o"]}).base_names == ("n", "o")
