"""A cluster's own folder: closed to other users, and never opened through a link."""

import os
from pathlib import Path

import pytest

from ranklet.cluster.command import cli
from ranklet.cluster.command.cluster_state import STATE_FILE, find_cluster
from ranklet.cluster.command.own_folder import OwnFolder


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def test_only_this_user_can_read_what_is_written(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path / "a" / "own")
    folder.create()
    path = folder.write("auth_token", "secret")
    assert (mode(folder.path), mode(path)) == (0o700, 0o600)
    assert folder.read("auth_token") == "secret"
    folder.create()
    assert folder.read("auth_token") == "secret", "a second start keeps the files"


def test_a_file_that_was_open_to_others_is_closed_by_the_next_write(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path / "own")
    folder.create()
    (folder.path / "config.yaml").write_text("old")
    (folder.path / "config.yaml").chmod(0o644)
    assert mode(folder.write("config.yaml", "new")) == 0o600


@pytest.mark.parametrize("name", ["config.yaml", "auth_token", STATE_FILE])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_read(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = OwnFolder(tmp_path / "own")
    folder.create()
    (folder.path / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        folder.read(name)
    folder.write(name, "own")
    assert (victim.read_text(), folder.read(name)) == ("precious", "own")


def test_a_folder_that_ray_had_opened_is_closed_and_cleared_of_links(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "own"
    victim.mkdir()
    path.mkdir()
    path.chmod(0o777)
    (path / "haproxy").symlink_to(victim)
    (path / "session_latest").symlink_to(victim)
    (path / "ray-start.log").write_text("old")
    OwnFolder(path).create()
    assert mode(path) == 0o700
    assert {each.name for each in path.iterdir()} == {"ray-start.log"}
    assert victim.is_dir()


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"with other files, such as thesis\.tex"):
        OwnFolder(tmp_path).create()
    assert mode(tmp_path) == 0o755


def test_a_link_to_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with pytest.raises(NotADirectoryError, match="got a link"):
        OwnFolder(link).create()
    link.unlink()
    link.symlink_to("/tmp")
    short = Path("/tmp") / f"r-{os.getpid()}"
    short.symlink_to(tmp_path / "real")
    try:
        assert cli.main(["down", "--temp-dir", str(short)]) == 1
    finally:
        short.unlink()
    assert "expected a folder, got a link" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user_are_not_believed(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path / "own")
    folder.create()
    path = folder.write(STATE_FILE, "{}")
    os.chown(path, 65534, 65534)
    with pytest.raises(ValueError, match="belongs to uid 65534"):
        find_cluster(folder.path)
    os.chown(folder.path, 65534, 65534)
    with pytest.raises(ValueError, match="belongs to uid 65534"):
        find_cluster(folder.path)
    with pytest.raises(ValueError, match="belongs to uid 65534"):
        folder.create()
