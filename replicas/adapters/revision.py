"""Revisions of adapter folders: a hash of their content, equal on every node that has the same files."""

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ranklet.replicas.adapters.content_hash import file_entry, piece_digests, tokenizer_hash
from ranklet.replicas.adapters.findings import collect
from ranklet.replicas.adapters.invocation import Invocation, invocation_of
from ranklet.replicas.adapters.limits import MAX_ADAPTER_BYTES
from ranklet.replicas.adapters.links import check_links
from ranklet.replicas.adapters.peft_config import read_fields
from ranklet.replicas.adapters.reference import CONFIG_FILE, FILES, OPTIONAL_FILES, AdapterRef
from ranklet.replicas.adapters.safetensors_header import UnreadableWeightsError, read_header
from ranklet.replicas.errors import AdapterChanged, AdapterNotFound, InvalidAdapter
from ranklet.replicas.model.tokenizer_files import TOKENIZER_FILES

_CHARACTERS = 16
_MAX_TRIES = 3
_LARGE_BYTES = 64 << 20  # hashed in a fifth of a second; only weights are larger
SETTLED_S = 0.1  # within this time of a change, a second one may leave the file's times as they are


def marks_of(path: str | Path) -> str:
    """Return sizes and times of an adapter's files. They change with the files, and no file is read.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return _stat(path).marks


def check_unchanged(adapter: AdapterRef, marks: str = "") -> None:
    """Raise AdapterChanged if an adapter's folder no longer has the files of its revision.

    Args:
        marks: those that the folder has now, if another process has read them.
    """
    if adapter.marks and (marks or marks_of(adapter.path)) != adapter.marks:
        raise AdapterChanged(f"adapter {adapter.name!r}: its files have changed. Send the request again")


def age_of(path: str | Path) -> float:
    """Return the seconds since the last change of a file; negative if the file system's clock is ahead.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return time.time() - _stat(path).changed_s


class FolderHash(NamedTuple):
    """Hashes of an adapter's files: of all, and of the tokenizer's (see `AdapterRef.tokenizer`)."""

    revision: str
    tokenizer: str | None


def revision_of(path: str | Path) -> str:
    """Read an adapter's files and return their revision; see `hash_of`."""
    return hash_of(path).revision


def hash_of(path: str | Path) -> FolderHash:
    """Read an adapter's files and return their revision, 16 hexadecimal digits, and the hash of the tokenizer's files.

    The revision is the SHA-256 of the name, the size and the SHA-256 digest of each MiB of `adapter_config.json`, then
    of the weights, then of the chat template, the tokenizer's files, those of sentence-transformers, `config.json` and
    `ranklet.json`, as far as it has them.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    _stat(path)
    folder, whole = Path(path), hashlib.sha256()
    entries: dict[str, bytes] = {}
    for name in files_in(folder):
        try:
            entries[name] = file_entry(name, *piece_digests(folder / name))
            whole.update(entries[name])
        except OSError as error:  # verification reports it
            whole.update(f"{name}:{error.errno};".encode())
    others = (name for name in TOKENIZER_FILES if name not in entries)
    is_known = not any(os.path.lexists(folder / name) for name in others)
    return FolderHash(whole.hexdigest()[:_CHARACTERS], tokenizer_hash(entries) if is_known else None)


def read_invocation(folder: Path) -> Invocation | None:
    """Read the tokens from which on an adapter changes a prompt; None without any, and if its load will be refused."""
    fields, _ = collect(read_fields(folder / CONFIG_FILE))
    return invocation_of(fields or {})


class Revisions:
    """Revisions of folders by path, read again when their files have changed. Thread-safe.

    Args:
        settled_s: a revision is kept only if the files are older than this.
        roots: folders that links in an adapter's folder may lead to.
        max_bytes: limit on the size of one adapter.
    """

    def __init__(
        self, settled_s: float = SETTLED_S, roots: Sequence[Path] = (), max_bytes: int = MAX_ADAPTER_BYTES
    ) -> None:
        self._settled_s = settled_s
        self._roots = tuple(roots)
        self._max_bytes = max_bytes
        self._known: dict[str, tuple[str, FolderHash, Invocation | None]] = {}  # marks, and what an `AdapterRef` has

    def reference(self, name: str, path: str) -> AdapterRef:
        """Return the current revision of a folder under a name; reads the files if they have changed.

        Raises:
            AdapterNotFound: the folder does not exist.
            InvalidAdapter: a link leads elsewhere, or the files are too large.
        """
        for _ in range(_MAX_TRIES):
            marks, changed_s, size = _stat(path)
            known, found, invocation = self._known.get(path, ("", FolderHash("", None), None))
            if known == marks:
                break
            self._check(name, Path(path), size)
            found, invocation = hash_of(path), read_invocation(Path(path))
            if marks_of(path) == marks:
                if time.time() - changed_s > self._settled_s:
                    self._known[path] = marks, found, invocation
                break
        return AdapterRef(name, path, found.revision, marks, invocation, found.tokenizer)

    def _check(self, name: str, folder: Path, size: int) -> None:
        findings = list(check_links(folder, files_in(folder), self._roots))
        if size > self._max_bytes:
            findings.append(f"expected at most {self._max_bytes} bytes (sources.max_adapter_bytes), got {size}")
        if not findings and size > _LARGE_BYTES:
            findings += _large_problems(folder)
        if findings:
            raise InvalidAdapter(name, findings)


def _large_problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with large files, as far as that shows at once.

    A file of holes takes no space, and a gigabyte of it takes seconds to hash.
    """
    for path in (folder / name for name in files_in(folder)):
        try:
            size = path.stat().st_size
            if size > _LARGE_BYTES and path.suffix == ".safetensors":
                read_header(path)
            elif size > _LARGE_BYTES:
                yield f"{path.name}: expected at most {_LARGE_BYTES} bytes, got {size}"
        except UnreadableWeightsError as error:
            yield str(error)
        except OSError:
            continue  # verification reports it


class _FolderStatus(NamedTuple):
    """Result of `marks_of`, the Unix time of the last change, and the size of all files."""

    marks: str
    changed_s: float
    size: int


def _stat(path: str | Path) -> _FolderStatus:
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter folder: expected a folder, got {str(path)!r}, which does not exist")
    marks, changed_s, size = [], 0.0, 0
    for name in files_in(folder):
        try:
            statuses = [(folder / name).lstat()]
            if stat.S_ISLNK(statuses[0].st_mode):  # a link that is replaced has another time, whatever it leads to
                statuses.append((folder / name).stat())
        except OSError:
            marks.append("absent")
            continue
        marks += [f"{each.st_size}:{each.st_mtime_ns}:{each.st_ctime_ns}" for each in statuses]
        changed_s = max(changed_s, *(max(each.st_mtime, each.st_ctime) for each in statuses))
        size += statuses[-1].st_size
    return _FolderStatus(";".join(marks), changed_s, size)


def files_in(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that make the revision; those of `FILES` may be missing."""
    try:
        entries = {path.name for path in folder.iterdir()}  # one call, since a folder has few of these files
    except OSError:
        entries = {name.partition("/")[0] for name in OPTIONAL_FILES}
    found = [name for name in OPTIONAL_FILES if name.partition("/")[0] in entries]
    return (*FILES, *(name for name in found if os.path.isfile(folder / name)))  # noqa: PTH113 - never raises
