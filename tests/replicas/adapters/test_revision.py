"""A revision depends on the content of an adapter's files and on nothing else."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.replicas.adapters import revision
from ranklet.replicas.adapters.content_hash import read_tokenizer_hash
from ranklet.replicas.adapters.reference import CONFIG_FILE, OPTIONAL_FILES, WEIGHTS_FILE
from ranklet.replicas.adapters.revision import FolderHash, Revisions, hash_of, marks_of, revision_of
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter

MIB = 1 << 20
LONG_AGO = (1_000_000_000, 1_000_000_000)  # ns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "adapter", b"content", b"content")


def made(folder: Path, config: bytes, weights: bytes) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def test_equal_content_has_an_equal_revision(folder: Path) -> None:
    first = revision_of(folder)
    (folder / "README.md").write_text("not part of the revision")
    os.utime(folder / WEIGHTS_FILE, ns=LONG_AGO)
    (folder / CONFIG_FILE).chmod(0o600)
    assert revision_of(str(folder)) == first
    assert revision_of(shutil.copytree(folder, folder.parent / "elsewhere")) == first


def test_a_revision_is_equal_in_every_version(folder: Path) -> None:
    """adapters.json names revisions, and nodes with different versions of ranklet may share it."""
    (folder / WEIGHTS_FILE).write_bytes(bytes(3 * MIB + 1))
    assert revision_of(folder) == "11f09acff617ff52"


def test_a_reference_has_the_invocation_of_its_revision(folder: Path) -> None:
    revisions = Revisions(settled_s=-1)
    for content, invocation in ((b'{"alora_invocation_tokens": [5, 6]}', (5, 6)), (b"{}", None), (b"[", None)):
        (folder / CONFIG_FILE).write_bytes(content)
        for _ in range(2):  # the second one is known
            found = revisions.reference("a", str(folder))
            assert (found.revision, found.invocation) == (revision_of(folder), invocation)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_revision_changes_with_the_content_even_if_size_and_times_do_not(folder: Path, name: str) -> None:
    os.utime(folder / name, ns=LONG_AGO)
    seen = {revision_of(folder)}
    (folder / name).write_bytes(b"CONTENT")
    os.utime(folder / name, ns=LONG_AGO)
    seen.add(revision_of(folder))
    (folder / name).write_bytes(b"")
    seen.add(revision_of(folder))
    (folder / name).unlink()
    seen.add(revision_of(folder))
    (folder / name).mkdir()
    seen.add(revision_of(folder))
    assert len(seen) == 5


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 5 * MIB) | st.sampled_from([MIB, 2 * MIB, 4 * MIB + 1]), data=st.data())
def test_every_byte_of_a_large_file_changes_the_revision(
    tmp_path_factory: pytest.TempPathFactory, size: int, data: st.DataObject
) -> None:
    folder = made(tmp_path_factory.mktemp("large") / "adapter", b"{}", bytes(size))
    first = revision_of(folder)
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(data.draw(st.integers(0, size - 1)))
        file.write(b"\1")
    assert revision_of(folder) != first
    (folder / WEIGHTS_FILE).write_bytes(bytes(size - 1))
    assert revision_of(folder) != first


def test_every_file_that_changes_an_answer_is_part_of_the_revision(folder: Path) -> None:
    """Prompts, vectors and the ends of texts depend on the files of the tokenizer and of sentence-transformers."""
    seen, marks = {revision_of(folder)}, {marks_of(folder)}
    for name in OPTIONAL_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        for content in ("{}", '{"other": 1}'):
            (folder / name).write_text(content)
            seen.add(revision_of(folder))
            marks.add(marks_of(folder))
    changes = 1 + 2 * len(OPTIONAL_FILES)
    assert (len(seen), len(marks)) == (changes, changes)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, who may list every folder")
def test_a_folder_that_may_not_be_listed_has_the_same_revision(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    before = revision_of(folder), marks_of(folder)
    folder.chmod(0o100)
    try:
        assert (revision_of(folder), marks_of(folder)) == before
    finally:
        folder.chmod(0o700)


def test_the_two_files_are_not_interchangeable(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    without_config = revision_of(folder)
    (folder / WEIGHTS_FILE).rename(folder / CONFIG_FILE)
    assert revision_of(folder) != without_config


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone", tmp_path / "file"):
        for look in (revision_of, marks_of, lambda path: Revisions().reference("x", str(path))):
            with pytest.raises(AdapterNotFound, match=path.name):
                look(path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose files were read, in order."""
    read: list[str] = []

    def counted(path: str) -> FolderHash:
        read.append(path)
        return hash_of(path)

    monkeypatch.setattr(revision, "hash_of", counted)
    return read


def test_files_are_read_once_until_they_change(folder: Path, reads: list[str]) -> None:
    revisions, path = Revisions(settled_s=-1.0), str(folder)
    first = revisions.reference("one", path)
    second = revisions.reference("two", path)
    assert (first.revision, first.name, second.name, len(reads)) == (hash_of(path).revision, "one", "two", 1)
    os.utime(folder / WEIGHTS_FILE)
    touched = revisions.reference("one", path)
    assert (touched == first, touched.marks == first.marks, len(reads)) == (True, False, 2)


@pytest.mark.parametrize(
    ("name", "begins", "says"),
    [
        (WEIGHTS_FILE, b"", "its header is no JSON object"),
        (WEIGHTS_FILE, (2).to_bytes(8, "little") + b"{}", "bytes of data for 0"),
        ("tokenizer.json", b"{}", "expected at most 67108864 bytes, got 3221225472"),
    ],
)
def test_a_large_file_that_cannot_be_whole_is_refused_unread(
    folder: Path, reads: list[str], name: str, begins: bytes, says: str
) -> None:
    with (folder / name).open("wb") as file:
        file.write(begins)
        file.truncate(3 << 30)
    with pytest.raises(InvalidAdapter, match=says):
        Revisions().reference("x", str(folder))
    assert reads == []


def test_a_large_file_of_weights_has_a_revision(folder: Path, reads: list[str]) -> None:
    header = b'{"a":{"dtype":"U8","shape":[67108864],"data_offsets":[0,67108864]}}'
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (64 << 20))
    assert Revisions().reference("x", str(folder)).revision == hash_of(folder).revision
    assert reads == [str(folder)]


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_noticed(folder: Path) -> None:
    os.utime(folder / WEIGHTS_FILE, ns=LONG_AGO)
    revisions, path = Revisions(), str(folder)
    first = revisions.reference("x", path)
    other = folder / "new"
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=LONG_AGO)
    other.rename(folder / WEIGHTS_FILE)
    assert revisions.reference("x", path) != first


def test_files_that_changed_recently_are_read_again(folder: Path, reads: list[str]) -> None:
    """A second change may fall into the same tick of the file system's clock."""
    revisions, path = Revisions(settled_s=3600.0), str(folder)
    assert revisions.reference("x", path) == revisions.reference("x", path)
    assert len(reads) == 2


def test_a_reference_names_one_state_of_files_that_keep_changing(folder: Path) -> None:
    """Its marks belong to that content, or the revision is read again next time."""
    revisions, path = Revisions(), str(folder)
    seen: dict[str, bytes] = {}
    for letter in (b"a", b"b"):
        (folder / WEIGHTS_FILE).write_bytes(letter * MIB)
        seen[revision_of(folder)] = letter
    over = threading.Event()

    def change() -> None:
        for number in range(60):
            new = folder / "new"
            new.write_bytes((b"a", b"b")[number % 2] * MIB)
            new.rename(folder / WEIGHTS_FILE)
        over.set()

    changing = threading.Thread(target=change)
    changing.start()
    while not over.is_set():
        assert revisions.reference("x", path).revision in seen
    changing.join()
    last = revisions.reference("x", path)
    assert (seen[last.revision], last.marks) == (b"b", marks_of(path))


def test_equal_tokenizer_files_have_one_hash(model_dir: Path, folder: Path, tmp_path: Path) -> None:
    def tokenizer(path: Path) -> str | None:
        return Revisions().reference("x", str(path)).tokenizer

    assert tokenizer(folder) == ""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, folder)
    found = tokenizer(folder)
    assert found == read_tokenizer_hash(model_dir) == read_tokenizer_hash(folder) != ""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / CONFIG_FILE).write_text("{}")
    assert tokenizer(copy) == found
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert tokenizer(copy) not in ("", None, found)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    assert tokenizer(copy) is None, "the load says that it is no file"
