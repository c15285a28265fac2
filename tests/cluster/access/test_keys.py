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

ROOT = Path(__file__).parents[3]


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


ENTRY = f"{{name: x, sha256: '{64 * 'a'}'}}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a list of entries, got an empty file"),
        ("[]", "expected a list of entries, got an empty file"),
        ("keys: 3", "expected a list of entries, got a map"),
        ("keys: []\nmore: 1", "expected a list of entries, got a map with other entries than `keys`"),
        ("rk-secret", "expected a list of entries, got a str"),
        ("{", "line 1: expected YAML"),
        ("[" * 2000, "expected a list of entries, got deep nesting"),
        ("keys: [{name: x, sha256: rk-secret}]", "entry 1: sha256: expected 64 hexadecimal digits"),
        (
            f"- {ENTRY}\n- {{name: y, sha256: {int('1' * 64)}}}",
            "entry 2: sha256: expected 64 hexadecimal digits in quotes",
        ),
        ("- rk-secret", "entry 1: expected a map with name, sha256, admin, adapters, tokens_per_minute"),
        (f"- {{name: x, sha256: '{64 * 'a'}', rk-secret: 1}}", "entry 1: expected a map with name"),
        (
            f"- {{name: x, sha256: '{64 * 'a'}', tokens_per_minute: 0}}",
            "entry 1: tokens_per_minute: expected a whole number of at",
        ),
        ("- {name: x}", "entry 1: expected sha256, got none"),
        (f"- {ENTRY}\n- {ENTRY}", "entry 2: expected another key than that of 'x'"),
    ],
)
def test_a_faulty_file_is_refused_at_the_start_with_the_form_that_is_expected(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(InternalError, match=f"^security.keys_file .*keys.yaml: ({reason})") as refused:
        ApiKeys(tmp_path / "keys.yaml")
    assert "rk-secret" not in refused.value.message, "a key in the wrong place is not shown"
    assert "\n" not in refused.value.message
    example = refused.value.message.partition("such as ")[2].partition(", by itself")[0]
    for form in (example, f"keys: {example}"):
        (tmp_path / "keys.yaml").write_text(form)
        ApiKeys(tmp_path / "keys.yaml")


def test_the_runbook_shows_a_file_that_works(tmp_path: Path) -> None:
    section = (ROOT / "deploy" / "README.md").read_text().partition("\n## Keys\n")[2].partition("\n## ")[0]
    (tmp_path / "keys.yaml").write_text(section.partition("```yaml\n")[2].partition("```")[0])
    ApiKeys(tmp_path / "keys.yaml")
    assert "tokens_per_minute" in (tmp_path / "keys.yaml").read_text()


def test_the_last_key_can_be_revoked(keys: Keys) -> None:
    keys.path.write_text("keys: []")
    with pytest.raises(Unauthorized):
        ApiKeys(keys.path).authenticate(bearer(keys.admin))


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="keys_file"):
        ApiKeys(tmp_path / "absent.yaml")


def test_the_command_prints_an_entry_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", "team", "--adapters", "legal-*", "--tokens-per-minute", "6000"]) == 0
    first, _, *entry = capsys.readouterr().out.splitlines()
    for above in ("", "keys:\n"):
        (tmp_path / "keys.yaml").write_text(above + "\n".join(entry))
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
