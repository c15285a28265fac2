"""The file of loaded and unloaded adapters, shared by processes."""

import contextlib
import os
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from ranklet.cluster.catalog.overrides import FolderNotWritable, Override, Overrides
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.catalog.source import AllowedSources
from ranklet.cluster.ingress.lifecycle import Lifecycle, LoadRequest
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.errors import InternalError, InvalidAdapter, RankletError


def test_processes_keep_each_others_entries(tmp_path: Path) -> None:
    one, other = Overrides(tmp_path), Overrides(tmp_path)
    one.put("a", Override(path="/a"))
    other.put("b", Override(path="/b", pinned=True))
    one.put("c", Override())
    one.put("a", None)
    expected = {"b": Override(path="/b", pinned=True), "c": Override()}
    assert other.entries(fresh=True) == expected
    assert Overrides(tmp_path).entries() == expected


def test_a_faulty_file_is_named(tmp_path: Path) -> None:
    opened = Overrides(tmp_path)
    opened.put("a", Override(path="/a"))
    (tmp_path / ".ranklet" / "adapters.json").write_text("{")
    with pytest.raises(InternalError, match=r"adapters\.json"):
        Overrides(tmp_path)
    with pytest.raises(InternalError, match=r"adapters\.json"):
        opened.put("b", Override())
    assert opened.entries(fresh=True) == {"a": Override(path="/a")}, "the last good content stays in force"


@pytest.mark.parametrize("fault", ["a file in its place", "no folder"])
async def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(
    fault: str, tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    registry = Registry(root, {})
    if fault != "no folder":
        root.mkdir()
        (root / ".ranklet").write_text("")
    assert registry.overrides is not None
    with pytest.raises(FolderNotWritable, match=r"adapters_dir/\.ranklet: expected a folder") as error:
        registry.overrides.put("a", Override())
    assert (error.value.status, str(root / ".ranklet") in error.value.message) == (503, True)
    lifecycle = Lifecycle(registry, create_autospec(ReplicasClient), create_autospec(lambda: None), [root], ())
    with pytest.raises(FolderNotWritable):
        await lifecycle.load(LoadRequest(name="a", path="a"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{tmp}/secret", "expected a folder under"),
        ("{tmp}/adapters/link", "expected a folder under"),
        ("{tmp}/adapters/../secret", "expected a folder under"),
        ("{tmp}/adapters/plain", None),
        ("{tmp}/staging/x", None),
        ("s3://models/legal#0123456789abcdef", None),
        ("s3://private/legal#0123456789abcdef", "sources.allowed"),
        ("http://127.0.0.1/legal", "sources.allowed"),
    ],
)
def test_entries_are_checked_as_loads_are_when_they_are_used(path: str, reason: str | None, tmp_path: Path) -> None:
    """Whoever may put a folder into adapters_dir can write the file as well."""
    root = tmp_path / "adapters"
    for folder in (root / "plain", tmp_path / "secret", tmp_path / "staging" / "x"):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "secret")
    Overrides(root).put("a", Override(path=path.format(tmp=tmp_path), pinned=True))
    registry = Registry(root, {}, allowed=AllowedSources((root, tmp_path / "staging"), ("s3://models",)))
    if reason is None:
        assert registry.locate("a").source == path.format(tmp=tmp_path)
        assert registry.pins().keys() == {"a"}
    else:
        with pytest.raises(InvalidAdapter, match=reason):
            registry.locate("a")
        assert registry.pins() == {}
        assert registry.names() == ["a"]


@pytest.mark.parametrize("name", ["adapters.json", "lock"])
def test_a_fifo_in_the_place_of_the_files_holds_nobody(name: str, tmp_path: Path) -> None:
    opened = Overrides(tmp_path)
    opened.put("a", Override(path="/a"))
    (tmp_path / ".ranklet" / name).unlink()
    os.mkfifo(tmp_path / ".ranklet" / name)
    with contextlib.suppress(RankletError):
        opened.put("b", Override())
    assert opened.entries(fresh=True)["a"] == Override(path="/a")
