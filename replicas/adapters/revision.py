"""Revisions of adapter folders: a hash of their content, equal on every node that has the same files."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranklet.replicas.adapters.reference import FILES, OPTIONAL_FILES, AdapterRef
from ranklet.replicas.errors import AdapterNotFound

_CHARACTERS = 16
_PIECE_BYTES = 1 << 20  # each piece has its own digest, so that threads can share a file
_THREADS = 8  # of one file; not shared between files, because a disk that hangs blocks them
_MAX_TRIES = 3
SETTLED_S = 0.1  # within this time of a change, a second one may leave the file's times as they are


def marks_of(path: str | Path) -> str:
    """Return sizes and times of an adapter's files. They change with the files, and no file is read.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return _stat(path)[0]


def age_of(path: str | Path) -> float:
    """Return the seconds since the last change of a file; negative if the file system's clock is ahead.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return time.time() - _stat(path)[1]


def revision_of(path: str | Path) -> str:
    """Read an adapter's files and return their revision, 16 hexadecimal digits.

    It is the SHA-256 of the name, the size and the SHA-256 digest of each MiB of `adapter_config.json`, then of the
    weights, then of the chat template, the tokenizer's files and those of sentence-transformers, as far as it has them.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    _stat(path)
    whole = hashlib.sha256()
    for name in _files_in(Path(path)):
        try:
            size, digests = piece_digests(Path(path) / name)
            whole.update(f"{name}:{size};".encode() + digests)
        except OSError as error:  # verification reports it
            whole.update(f"{name}:{error.errno};".encode())
    return whole.hexdigest()[:_CHARACTERS]


class Revisions:
    """Revisions of folders by path, read again when their files have changed. Thread-safe.

    Args:
        settled_s: a revision is kept only if the files are older than this.
    """

    def __init__(self, settled_s: float = SETTLED_S) -> None:
        self._settled_s = settled_s
        self._known: dict[str, tuple[str, str]] = {}  # marks and revision

    def reference(self, name: str, path: str) -> AdapterRef:
        """Return the current revision of a folder under a name; reads the files if they have changed.

        Raises:
            AdapterNotFound: the folder does not exist.
        """
        for _ in range(_MAX_TRIES):
            marks, changed_s = _stat(path)
            known, revision = self._known.get(path, ("", ""))
            if known == marks:
                break
            revision = revision_of(path)
            if marks_of(path) == marks:
                if time.time() - changed_s > self._settled_s:
                    self._known[path] = marks, revision
                break
        return AdapterRef(name, path, revision, marks)


def _stat(path: str | Path) -> tuple[str, float]:
    """Return `marks_of`, and the Unix time of the last change."""
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter folder: expected a folder, got {str(path)!r}, which does not exist")
    marks, changed_s = [], 0.0
    for name in _files_in(folder):
        try:
            status = (folder / name).stat()
            marks.append(f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}")
            changed_s = max(changed_s, status.st_mtime, status.st_ctime)
        except OSError:
            marks.append("absent")
    return ";".join(marks), changed_s


def _files_in(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that make the revision; those of `FILES` may be missing."""
    try:
        entries = {path.name for path in folder.iterdir()}  # one call, since a folder has few of these files
    except OSError:
        entries = {name.partition("/")[0] for name in OPTIONAL_FILES}
    found = [name for name in OPTIONAL_FILES if name.partition("/")[0] in entries]
    return (*FILES, *(name for name in found if os.path.isfile(folder / name)))  # noqa: PTH113 - never raises


def piece_digests(path: Path) -> tuple[int, bytes]:
    """Return a file's size and the SHA-256 of each piece. Reads and hashes without the GIL."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(file, _PIECE_BYTES, start)).digest()

        starts = range(0, size, _PIECE_BYTES)
        if len(starts) <= 1:
            return size, b"".join(map(digest, starts))
        with ThreadPoolExecutor(min(_THREADS, len(starts)), thread_name_prefix="hash") as threads:
            return size, b"".join(threads.map(digest, starts))
    finally:
        os.close(file)
