"""A revision changes when the folder's files do, and only then."""

import os
from pathlib import Path

import pytest

from ranklet.replicas.errors import AdapterNotFound
from ranklet.replicas.reference import CONFIG_FILE, WEIGHTS_FILE, revision_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes(b"content")
        os.utime(tmp_path / name, ns=(1_000_000_000, 1_000_000_000))
    return tmp_path


def test_it_stays_while_the_files_do(folder: Path) -> None:
    first = revision_of(folder)
    (folder / "README.md").write_text("notes are no revision")
    assert revision_of(str(folder)) == first


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_it_changes_with_size_time_and_presence(folder: Path, name: str) -> None:
    seen = {revision_of(folder)}
    os.utime(folder / name, ns=(1_000_000_000, 1_000_000_001))
    seen.add(revision_of(folder))
    (folder / name).write_bytes(b"longer content")
    os.utime(folder / name, ns=(1_000_000_000, 1_000_000_000))
    seen.add(revision_of(folder))
    (folder / name).unlink()
    seen.add(revision_of(folder))
    assert len(seen) == 4


def test_the_two_files_are_not_interchangeable(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    without_config = revision_of(folder)
    (folder / WEIGHTS_FILE).rename(folder / CONFIG_FILE)
    assert revision_of(folder) != without_config


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(AdapterNotFound, match=path.name):
            revision_of(path)
