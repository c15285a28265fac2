"""Names of adapters, and the adapters that requests mean by them."""

import json
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.names import name_error
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, RankletError, UnknownModel
from ranklet.replicas.escape import escape

Form = Literal["NFC", "NFD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD")


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("legal-v1", "legal-v2", "médical"):
        folder(tmp_path / "root" / name)
    (tmp_path / "root" / ".hidden").mkdir()
    (tmp_path / "root" / "file").write_text("")
    folder(tmp_path / "secret")
    return tmp_path / "root"


def test_subfolders_and_configured_folders_are_adapters(root: Path) -> None:
    registry = Registry(root, {"mapped": root.parent / "secret"})
    assert registry.names() == ["legal-v1", "legal-v2", "mapped", "médical"]
    assert registry.locate("médical").source == str(root / "médical")
    assert registry.locate("mapped").source == str(root.parent / "secret")


def test_a_new_folder_is_found_at_once(root: Path) -> None:
    registry = Registry(root, {})
    with pytest.raises(UnknownModel):
        registry.locate("new")
    folder(root / "new")
    assert registry.locate("new").name == "new"


@pytest.mark.parametrize("name", ["../secret", "..", "/etc", "a/../../secret", "~/x", "..\\secret", "a\0b"])
def test_a_path_is_refused(root: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="path"):
        Registry(root, {}).locate(name)


def test_links_may_not_leave_the_root(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "secret")
    (root / "within").symlink_to(root / "legal-v1")
    (root / "broken").symlink_to(root / "nowhere")
    registry = Registry(root, {})
    with pytest.raises(InvalidAdapter, match="link"):
        registry.locate("out")
    assert registry.locate("within").source == str(root / "within")
    with pytest.raises(UnknownModel):
        registry.locate("broken")


def test_the_error_for_an_unknown_name_lists_similar_names(root: Path) -> None:
    with pytest.raises(UnknownModel, match=r"Similar names: legal-v[12], legal-v[12]"):
        Registry(root, {}).locate("legal")


def test_faulty_configured_folders_are_refused_with_a_reason(root: Path) -> None:
    registry = Registry(root, {"up": root / ".." / "secret", "gone": root / "gone", "a*b": root, "file": root / "file"})
    with pytest.raises(AdapterNotFound):
        registry.locate("gone")
    for name in ("up", "a*b", "file"):
        with pytest.raises(InvalidAdapter):
            registry.locate(name)


def test_user_config_takes_precedence_until_it_is_removed(root: Path) -> None:
    registry = Registry(root, {"x": root / "legal-v1"})
    registry.set_user_config({"x": root / "legal-v2", "y": root / "legal-v2"})
    assert registry.locate("x").source == registry.locate("y").source == str(root / "legal-v2")
    registry.set_user_config({})
    assert registry.locate("x").source == str(root / "legal-v1")
    with pytest.raises(UnknownModel):
        registry.locate("y")


@given(st.text())
def test_no_name_leaves_the_root(name: str) -> None:
    root = Path(__file__).parent  # any folder that has neighbours
    try:
        location = Registry(root, {}).locate(name)
    except RankletError:
        return
    assert Path(location.source).parent == root
    assert name_error(name) is None


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_name_is_found_in_each_unicode_form(root: Path, written: Form, asked: Form) -> None:
    made = folder(root / unicodedata.normalize(written, "café"))
    registry = Registry(root, {}, ["base"])
    location = registry.locate(unicodedata.normalize(asked, "café"))
    assert (location.name, location.source) == ("café", str(made))
    assert "café" in registry.names()
    assert [location.source for location, _ in registry.scan() if location.name == "café"] == [str(made)]


def test_a_name_in_neither_unicode_form_is_found(root: Path) -> None:
    mixed = "é" + unicodedata.normalize("NFD", "é")
    folder(root / mixed)
    assert Registry(root, {}).locate("éé").source == str(root / mixed)


def test_of_two_folders_with_one_name_the_second_is_skipped_with_the_reason(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in FORMS)
    for name in (decomposed, composed):
        folder(root / name)
    registry = Registry(root, {})
    assert registry.locate(decomposed).source == str(root / composed)
    assert list(registry.skipped()) == [decomposed]
    assert "another Unicode form" in registry.skipped()[decomposed]


@pytest.mark.parametrize("name", ["a:b", "a@b", "legal[v2]", "legal [old]", "v2.1", "名前", "x]y[z"])
def test_folders_may_have_any_plain_characters(root: Path, name: str) -> None:
    folder(root / name)
    registry = Registry(root, {})
    assert registry.locate(name).source == str(root / name)
    assert name in registry.names()


@pytest.mark.parametrize("name", ["a*b", "a?b", "a\\b", "a\nb", " a", "a@0123456789abcdef", "\u202eb", "\udcff"])
def test_folders_with_other_names_are_skipped_with_the_reason(root: Path, name: str) -> None:
    folder(root / name)
    registry = Registry(root, {})
    shown = escape(name)
    assert registry.skipped()[shown].startswith("expected")
    assert json.dumps(registry.skipped()).encode()
    assert shown not in registry.names()


def test_a_folder_without_a_config_is_skipped_until_it_has_one(root: Path) -> None:
    (root / "half").mkdir()
    (root / "lost+found").mkdir()
    registry = Registry(root, {})
    assert list(registry.skipped()) == ["half"], "files, hidden folders and those of file systems are not listed"
    assert "adapter_config.json" in registry.skipped()["half"]
    (root / "half" / "adapter_config.json").write_text("{}")
    assert registry.skipped() == {}
    assert "half" in registry.names()


def test_a_folder_below_a_subfolder_has_no_name(root: Path) -> None:
    folder(root / "org" / "legal")
    with pytest.raises(UnknownModel):
        Registry(root, {}).locate("org/legal")


@pytest.mark.parametrize("name", ["base", "base:legal-v1"])
def test_an_adapter_named_like_the_base_model_is_refused_and_not_listed_as_a_model(root: Path, name: str) -> None:
    folder(root / name)
    registry = Registry(root, {}, ["base", "org/base"])
    for asked in (name, f"{name}@0123456789abcdef"):
        with pytest.raises(InvalidAdapter, match="a name of the base model"):
            registry.locate(asked)
    assert name in registry.names()
    assert name not in [location.name for location, _ in registry.scan()]
    with pytest.raises(UnknownModel, match="a name of the base model"):
        registry.locate("org/base")


def names(root: Path) -> ModelNames:
    return ModelNames(["base", "org/base", "base:4b"], Registry(root, {}, ["base", "org/base", "base:4b"]))


@pytest.mark.parametrize("model", ["base", "org/base", "base:4b"])
def test_the_base_model_has_several_names(root: Path, model: str) -> None:
    assert names(root).resolve(None, model) is None


@pytest.mark.parametrize(
    ("model", "lora_path"),
    [
        ("legal-v2", None),
        ("base:legal-v2", None),
        ("org/base:legal-v2", None),
        ("base:4b:legal-v2", None),
        ("base", "legal-v2"),
        (None, "legal-v2"),
        ("legal-v2", "legal-v2"),
        ("legal-v2", ""),
    ],
)
def test_a_request_may_name_an_adapter_in_several_ways(root: Path, model: str | None, lora_path: str | None) -> None:
    location = names(root).resolve(None, model, lora_path)
    assert location is not None
    assert location.name == "legal-v2"


@pytest.mark.parametrize("model", ["other:legal-v2", "base:", "base:base", "Base", "org/other"])
def test_other_names_are_unknown(root: Path, model: str) -> None:
    with pytest.raises(UnknownModel):
        names(root).resolve(None, model)


def test_contradictory_names_are_refused(root: Path) -> None:
    with pytest.raises(InvalidRequest, match="lora_path"):
        names(root).resolve(None, "legal-v1", "legal-v2")
    with pytest.raises(InvalidRequest, match="model"):
        names(root).resolve(None, None, None)
