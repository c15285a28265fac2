"""API keys: by hash, with scopes, read again when the file changes; nothing of them is ever shown."""

from pathlib import Path

import pytest
import yaml

from ranklet.cluster.access import keys
from ranklet.cluster.access.keys import ApiKeys, Forbidden, Unauthorized, new_key
from ranklet.cluster.catalog.overrides import Override, Overrides
from ranklet.cluster.command import cli
from ranklet.replicas.errors import InternalError


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, str]:
    """A file with an admin's key and a team's, and both keys."""
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)
    admin, entry = new_key("ops", admin=True, adapters=())
    team, other = new_key("team", admin=False, adapters=("legal-*", "base"))
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json"), other.model_dump(mode="json")]}))
    return path, admin, team


def test_scopes(written: tuple[Path, str, str]) -> None:
    path, admin, team = written
    assert admin not in path.read_text()
    known = ApiKeys(path)
    known.require_admin(bearer(admin))
    with pytest.raises(Forbidden, match="team"):
        known.require_admin(bearer(team))
    key = known.authenticate({"x-api-key": team})
    known.authorize(key, "legal-v2")
    known.authorize(known.authenticate(bearer(admin)), "medical")
    with pytest.raises(Forbidden, match="legal-\\*"):
        known.authorize(key, "medical")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic x"}, bearer(""), bearer("wrong"), {"x-api-key": "é"}])
def test_without_a_known_key_nothing_goes(written: tuple[Path, str, str], headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        ApiKeys(written[0]).authenticate(headers)


def test_a_changed_file_is_in_force_and_a_wrong_one_is_not(written: tuple[Path, str, str]) -> None:
    path, admin, team = written
    known = ApiKeys(path)
    content = yaml.safe_load(path.read_text())
    path.write_text("keys: [{name: x}]")
    assert known.authenticate(bearer(team)), "the last good content"
    assert "sha256" in known.wrong
    path.write_text(yaml.safe_dump({"keys": content["keys"][:1]}))
    with pytest.raises(Unauthorized):
        known.authenticate(bearer(team))
    assert known.authenticate(bearer(admin))
    assert not known.wrong


@pytest.mark.parametrize("text", ["", "keys: 3", "[]", "keys: [{name: x, sha256: abc}]", "{", "keys: []\nmore: 1"])
def test_a_wrong_file_at_the_start_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(InternalError, match="keys_file"):
        ApiKeys(tmp_path / "keys.yaml")
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


def test_without_keys_only_an_open_service_takes_an_admins_calls() -> None:
    assert ApiKeys(None).authenticate({}) is None
    ApiKeys(None, open_admin=True).require_admin({})
    with pytest.raises(Unauthorized, match=r"127\.0\.0\.1"):
        ApiKeys(None).require_admin({})


def test_books_of_several_processes_keep_each_others_entries(tmp_path: Path) -> None:
    one, other = Overrides(tmp_path), Overrides(tmp_path)
    one.put("a", Override(path="/a"))
    other.put("b", Override(path="/b", pinned=True))
    one.put("c", Override())
    one.put("a", None)
    assert (
        other.entries(fresh=True)
        == {"b": Override(path="/b", pinned=True), "c": Override()}
        == Overrides(tmp_path).entries()
    )
    (tmp_path / ".ranklet" / "adapters.json").write_text("{")
    with pytest.raises(InternalError, match=r"adapters\.json"):
        Overrides(tmp_path)
