"""`ranklet up` opens calls that change adapters where only this machine can send them, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from ranklet.cluster.command.deployment_file import with_open_admin
from tests.cluster.service import Service, local_configuration


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


def test_a_local_service_lets_its_machine_unload_adapters(service: Service) -> None:
    assert service.http.delete("/v1/adapters/no-such").status_code == 404
