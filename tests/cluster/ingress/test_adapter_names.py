"""The names and paths that the calls for adapters accept; the replicas are mocks."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import pytest

from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.ingress.adapter_cards import AdapterCards
from ranklet.cluster.ingress.lifecycle import AdapterExists, Lifecycle, LoadRequest
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.adapters.reference import CONFIG_FILE, AdapterInfo
from ranklet.replicas.errors import AdapterNotFound, UnknownModel


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
    return Registry(tmp_path, {})


@pytest.fixture
def lifecycle(registry: Registry, replicas: Any, tmp_path: Path) -> Lifecycle:
    return Lifecycle(registry, replicas, AsyncMock(), [tmp_path], ())


@pytest.mark.parametrize("name", ["legal@r1", "empty", "no-such"])
async def test_a_name_that_is_not_listed_has_no_card(registry: Registry, replicas: Any, name: str) -> None:
    with pytest.raises(UnknownModel, match=name):
        await AdapterCards(registry, replicas).card(name)


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
