"""The names and paths that the calls for adapters accept; the replicas are mocks."""

import unicodedata
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import pytest

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.lifecycle import AdapterExists, Lifecycle, LoadRequest
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.adapters.reference import CONFIG_FILE, AdapterInfo
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, UnknownModel


@pytest.fixture
def replicas() -> Any:
    replicas = create_autospec(ReplicasClient, instance=True)
    replicas.reports.return_value = []
    replicas.load.return_value = AdapterInfo("legal", "r1", 8, ("q_proj",), 1000)
    return replicas


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """It has one adapter, legal, and a folder without a config."""
    for name in ("legal", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "legal" / CONFIG_FILE).write_text("{}")
    return Registry(tmp_path, {}, ["base", "org/base"])


@pytest.fixture
def lifecycle(registry: Registry, replicas: Any, tmp_path: Path) -> Lifecycle:
    return Lifecycle(registry, replicas, AsyncMock(), [tmp_path], ())


@pytest.mark.parametrize("name", ["legal@r1", "no-such", "base"])
async def test_a_name_that_is_not_listed_has_no_card(registry: Registry, replicas: Any, name: str) -> None:
    with pytest.raises(UnknownModel, match=name):
        await AdapterCards(registry, replicas).card(name)


async def test_folders_that_are_no_adapters_are_listed_as_failed_with_the_reason(
    registry: Registry, replicas: Any, tmp_path: Path
) -> None:
    for name in ("base", "a*b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text("{}")
    cards = AdapterCards(registry, replicas)
    listed = {card["name"]: card for card in await cards.cards()}
    assert {name: card["state"] for name, card in listed.items()} == {
        "legal": "registered", "base": "failed", "a*b": "failed", "empty": "failed"
    }  # fmt: skip
    for name, reason in (("base", "name of the base model"), ("a*b", "without"), ("empty", CONFIG_FILE)):
        assert reason in listed[name]["error"]
        assert await cards.card(name) == listed[name]


async def test_revisions_are_read_of_adapters_up_to_the_services_limit(
    registry: Registry, replicas: Any, tmp_path: Path
) -> None:
    named = AdapterLocation("legal", str(tmp_path / "legal"), revision_of(tmp_path / "legal"))
    await AdapterCards(registry, replicas, max_bytes=2).check_revision(named)
    with pytest.raises(InvalidAdapter, match=r"at most 1 bytes \(sources.max_adapter_bytes\), got 2"):
        await AdapterCards(registry, replicas, max_bytes=1).check_revision(named)


@pytest.mark.parametrize("name", ["org/legal", "org/legal@v1", "legal:v1", "legal[v2]", "cafe\u0301", "v1@2"])
async def test_names_of_hubs_and_other_servers_are_loaded_and_unloaded(
    registry: Registry, lifecycle: Lifecycle, tmp_path: Path, name: str
) -> None:
    await lifecycle.load(LoadRequest(name=name, path="legal"))
    names = ModelNames(["base"], registry)
    for model in (name, f"base:{name}", unicodedata.normalize("NFC", name)):
        found = names.resolve(None, model)
        assert found is not None
        assert (found.name, found.source) == (unicodedata.normalize("NFC", name), str(tmp_path / "legal"))
    pinned = names.resolve(None, f"{name}@0123456789abcdef")
    assert pinned is not None
    assert pinned.requested_revision == "0123456789abcdef"
    await lifecycle.unload(name)
    with pytest.raises(UnknownModel):
        names.resolve(None, name)


@pytest.mark.parametrize(
    "name",
    ["base", "org/base", "base:x", "org/base:x", "a/../b", "a//b", "/a", "a/", ".a", "a/.b", "~a", "", " a", "a ",
     "a\\b", "a*", "a?", "a\0b", "a@0123456789abcdef", "x" * 201],
)  # fmt: skip
async def test_other_names_are_refused(registry: Registry, lifecycle: Lifecycle, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await lifecycle.load(LoadRequest(name=name, path="legal", replace=True))
    assert refused.value.param == "name"
    assert registry.names() == ["legal"]


async def test_an_adapter_without_a_folder_can_be_unloaded(
    registry: Registry, lifecycle: Lifecycle, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    await lifecycle.load(LoadRequest(name="legal-v2", path="other"))
    (tmp_path / "other").rmdir()
    await lifecycle.unload("legal-v2")
    assert registry.names() == ["legal"]


async def test_a_folder_is_loaded_by_a_name_in_another_unicode_form(lifecycle: Lifecycle, tmp_path: Path) -> None:
    made = tmp_path / unicodedata.normalize("NFD", "café")
    made.mkdir()
    for path in (None, "café"):
        loaded = await lifecycle.load(LoadRequest(name="café", path=path, replace=True))
        assert loaded["path"] == str(made)


async def test_a_name_with_a_revision_cannot_be_unloaded(registry: Registry, lifecycle: Lifecycle) -> None:
    with pytest.raises(UnknownModel, match="without a revision"):
        await lifecycle.unload("legal@r1")
    assert registry.names() == ["legal"]
    await lifecycle.unload("legal")
    assert registry.names() == []


async def test_the_folder_that_a_name_already_serves_may_be_given_as_its_path(
    registry: Registry, lifecycle: Lifecycle, tmp_path: Path
) -> None:
    for path in ("legal", str(tmp_path / "legal")):
        await lifecycle.load(LoadRequest(name="legal", path=path, replace=path != "legal"))
        assert registry.locate("legal").source == str(tmp_path / "legal")
    with pytest.raises(AdapterExists):
        await lifecycle.load(LoadRequest(name="legal", path="empty"))


@pytest.mark.parametrize(("name", "error"), [("legal", AdapterExists), ("new", AdapterNotFound)])
async def test_a_path_that_no_file_can_have_is_refused(lifecycle: Lifecycle, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await lifecycle.load(LoadRequest(name=name, path="a\0b"))


async def test_pins_of_loads_at_the_same_time_are_kept(lifecycle: Lifecycle, replicas: Any, registry: Registry) -> None:
    other = LoadRequest(name="other", path="legal", pinned=True)

    async def load_other_first(*arguments: Any) -> AdapterInfo:
        replicas.load.side_effect = None
        await lifecycle.load(other)
        return replicas.load.return_value  # type: ignore[no-any-return]

    replicas.load.side_effect = load_other_first
    await lifecycle.load(LoadRequest(name="legal", path="legal", pinned=True))
    assert replicas.pin.await_args.args[0].keys() == registry.pins().keys() == {"legal", "other"}
