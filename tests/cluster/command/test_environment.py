"""The environment that Ray gets: no proxy for this machine, and a name for a user who has none."""

import pwd
import socket
from pathlib import Path

import pytest

from ranklet.cluster.command import cli
from ranklet.cluster.command.no_proxy import no_proxy_variables
from ranklet.cluster.command.ray_head import RayHead
from ranklet.cluster.command.user import user_name

HOSTS = ("127.0.0.1", "localhost", "::1")


@pytest.mark.parametrize(
    "given",
    [{}, {"NO_PROXY": "a.example"}, {"no_proxy": " a.example, 10.0.0.1,"}, {"NO_PROXY": "a.example", "no_proxy": "b"}],
)
def test_this_machine_is_asked_without_a_proxy(given: dict[str, str]) -> None:
    variables = no_proxy_variables(given)
    assert variables["NO_PROXY"] == variables["no_proxy"]
    hosts = variables["no_proxy"].split(",")
    assert set(HOSTS) < set(hosts)
    assert "" not in hosts
    assert {name.strip() for value in given.values() for name in value.split(",")} - {""} <= set(hosts)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("8.8.8.8", 53))
        assert sock.getsockname()[0] in hosts


def test_ray_gets_these_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    environment = RayHead.with_free_ports(tmp_path, "serve", on_loopback=True).environment({})
    assert "127.0.0.1" in environment["no_proxy"].split(",")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["HTTP_PROXY"] == "http://127.0.0.1:9", "downloads go through it"


def test_a_user_without_a_name_is_called_by_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_name().isdigit()
    assert cli.main(["version"]) == 0
    assert cli.main(["doctor"]) in (0, 1)
    capsys.readouterr()
    environment = RayHead.with_free_ports(tmp_path, "serve", on_loopback=True).environment({})
    assert environment["USER"] == user_name()
