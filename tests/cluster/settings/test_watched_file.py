"""A watched file is read again when it has changed, and not before the interval has passed."""

import logging
from pathlib import Path

import pytest

from ranklet.cluster.settings.setting import NoKeeper, Setting
from ranklet.cluster.settings.watched_file import WatchedFile


class Clock:
    now_s = 0.5

    def __call__(self) -> float:
        return self.now_s


def read(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    if "wrong" in text:
        raise ValueError(f"wrong content: {text}")
    return text


def setting() -> Setting[str]:
    return Setting("file", ValueError, NoKeeper())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("one")
    return tmp_path / "file"


def test_a_change_is_seen_once_the_interval_has_passed(path: Path) -> None:
    clock = Clock()
    watched = WatchedFile(path, read, setting(), 10.0, clock)
    path.write_text("another")
    clock.now_s += 9
    assert watched.content() == "one"
    clock.now_s += 1
    assert watched.content() == "another"
    path.unlink()
    assert watched.content() == "another"
    assert watched.content(fresh=True) == ""


def test_an_unchanged_file_is_not_read_again(path: Path) -> None:
    reads: list[Path] = []

    def counted(path: Path) -> str:
        reads.append(path)
        return read(path)

    watched = WatchedFile(path, counted, setting(), 0.0, Clock())
    assert [watched.content() for _ in range(3)] == ["one"] * 3
    assert len(reads) == 1


def test_a_faulty_change_is_logged_once_and_the_last_good_content_stays(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = WatchedFile(path, read, setting(), 0.0, Clock())
    path.write_text("wrong")
    with caplog.at_level(logging.ERROR):
        assert [watched.content() for _ in range(3)] == ["one"] * 3
    assert caplog.text.count("wrong content") == 1
    path.write_text("right")
    assert watched.content() == "right"


def test_a_faulty_file_is_refused_at_the_start(path: Path) -> None:
    path.write_text("wrong")
    with pytest.raises(ValueError, match="wrong content"):
        WatchedFile(path, read, setting(), 0.0)
