"""The file of loaded and unloaded adapters, shared by processes."""

from pathlib import Path

import pytest

from ranklet.cluster.catalog.overrides import Override, Overrides
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
