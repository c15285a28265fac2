"""The file of loaded and unloaded adapters, shared by processes."""

from pathlib import Path
from unittest.mock import create_autospec

import pytest

from ranklet.cluster.catalog.overrides import FolderNotWritable, Override, Overrides
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.ingress.lifecycle import Lifecycle, LoadRequest
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.errors import InternalError


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
