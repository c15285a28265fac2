"""API keys: stored by hash, with rights, read again when the file changes."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ranklet.cluster.access.keys import ApiKeys, Forbidden, Unauthorized, new_key
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.command import cli
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.replicas.errors import InternalError


@dataclass(frozen=True)
class Keys:
    """A file with an administrator's key and a team's key, and both secrets."""

    path: Path
    admin: str
    team: str


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    admin, entry = new_key("ops", admin=True, adapters=())
    team, other = new_key("team", admin=False, adapters=("legal-*", "base"))
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json"), other.model_dump(mode="json")]}))
    return Keys(path, admin, team)


def test_a_key_grants_its_rights_and_no_others(keys: Keys) -> None:
    loaded = ApiKeys(keys.path)
    loaded.require_admin(bearer(keys.admin))
    with pytest.raises(Forbidden, match="team"):
        loaded.require_admin(bearer(keys.team))
    team = loaded.authenticate({"x-api-key": keys.team})
    loaded.authorize(team, "legal-v2")
    loaded.authorize(loaded.authenticate(bearer(keys.admin)), "medical")
    with pytest.raises(Forbidden, match="legal-\\*"):
        loaded.authorize(team, "medical")


def test_the_file_does_not_contain_the_keys_themselves(keys: Keys) -> None:
    assert not any(secret in keys.path.read_text() for secret in (keys.admin, keys.team))


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic x"}, bearer(""), bearer("wrong"), {"x-api-key": "é"}])
def test_a_request_without_a_known_key_is_refused(keys: Keys, headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        ApiKeys(keys.path).authenticate(headers)


def test_a_changed_file_takes_effect_and_a_faulty_one_does_not(keys: Keys) -> None:
    now_s = 0.5
    loaded = ApiKeys(keys.path, clock=lambda: now_s)
    content = yaml.safe_load(keys.path.read_text())
    keys.path.write_text("keys: [{name: x}]")
    now_s += 2
    assert loaded.authenticate(bearer(keys.team)), "the last good content stays in force"
    keys.path.write_text(yaml.safe_dump({"keys": content["keys"][:1]}))
    now_s += 2
    with pytest.raises(Unauthorized):
        loaded.authenticate(bearer(keys.team))
    assert loaded.authenticate(bearer(keys.admin))


@pytest.mark.parametrize("text", ["", "keys: 3", "[]", "keys: [{name: x, sha256: abc}]", "{", "keys: []\nmore: 1"])
def test_a_faulty_file_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(InternalError, match="keys_file"):
        ApiKeys(tmp_path / "keys.yaml")


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="keys_file"):
        ApiKeys(tmp_path / "absent.yaml")


def test_the_command_prints_an_entry_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", "team", "--adapters", "legal-*", "--tokens-per-minute", "6000"]) == 0
    first, _, *entry = capsys.readouterr().out.splitlines()
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": yaml.safe_load("\n".join(entry))}))
    key = ApiKeys(tmp_path / "keys.yaml").authenticate(bearer(first.split()[-1]))
    assert key is not None
    assert (key.name, key.adapters, key.tokens_per_minute) == ("team", ("legal-*",), 6000)
    assert cli.main(["keys", "new", "team", "--tokens-per-minute", "0"]) == 1


def test_without_keys_only_an_open_service_lets_requests_change_adapters() -> None:
    assert ApiKeys(None).authenticate({}) is None
    ApiKeys(None, open_admin=True).require_admin({})
    with pytest.raises(Unauthorized, match="open_admin"):
        ApiKeys(None).require_admin({})


@pytest.mark.parametrize(
    ("allowed", "may"), [("Org/Base", True), ("demo-base", True), ("Org/*", True), ("base", False)]
)
def test_a_key_for_one_name_of_the_base_model_allows_all_of_its_names(tmp_path: Path, allowed: str, may: bool) -> None:
    secret, entry = new_key("team", admin=False, adapters=(allowed,))
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json")]}))
    loaded = ApiKeys(tmp_path / "keys.yaml")
    names = ModelNames(["demo-base", "Org/Base"], Registry(None, {})).names_of("demo-base")
    with contextlib.nullcontext() if may else pytest.raises(Forbidden, match="got 'demo-base'"):
        loaded.authorize(loaded.authenticate(bearer(secret)), *names)
