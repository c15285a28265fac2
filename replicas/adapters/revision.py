"""Revisions of adapter folders: a hash of their content, so that one content has one revision on every node."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranklet.replicas.adapters.reference import FILES, AdapterRef
from ranklet.replicas.errors import AdapterNotFound

_CHARACTERS = 16
_PIECE = 1 << 20  # bytes hashed for themselves, so that threads can share a file
_THREADS = 8  # for a large one; not shared, as a disk that hangs keeps them
_TRIES = 3
_SETTLED_S = 0.1  # a file changed so lately may change again within one tick of its clock


def marks_of(path: str | Path) -> str:
    """What tells that the files of an adapter's folder have changed without reading them: sizes and times.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return _look(path)[0]


def age_of(path: str | Path) -> float:
    """Seconds since one of the files was last written or replaced; below 0 where clocks differ.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    return time.time() - _look(path)[1]


def revision_of(path: str | Path) -> str:
    """16 hexadecimal digits that follow from the content of an adapter's files; they are read whole.

    SHA-256 over name, size and SHA-256 digests of all MiB of `adapter_config.json`, then of the weights.

    Raises:
        AdapterNotFound: the folder does not exist.
    """
    _look(path)
    whole = hashlib.sha256()
    for name in FILES:
        try:
            size, digests = _digests(Path(path) / name)
            whole.update(f"{name}:{size};".encode() + digests)
        except OSError as error:  # what cannot be read is a finding of verification, not of naming
            whole.update(f"{name}:{error.errno};".encode())
    return whole.hexdigest()[:_CHARACTERS]


class Revisions:
    """Revisions of folders by path, read again when their files have changed. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}  # marks and revision

    def reference(self, name: str, path: str) -> AdapterRef:
        """The adapter `name` as it is now; blocks while its files are read, if need be.

        Raises:
            AdapterNotFound: the folder does not exist.
        """
        for _ in range(_TRIES):
            marks, changed_s = _look(path)
            known, revision = self._known.get(path, ("", ""))
            if known == marks:
                break
            revision = revision_of(path)
            if marks_of(path) == marks:
                if time.time() - changed_s > _SETTLED_S:
                    self._known[path] = marks, revision
                break
        return AdapterRef(name, path, revision, marks)


def _look(path: str | Path) -> tuple[str, float]:
    """`marks_of`, and when the last of the files was changed, in Unix time."""
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter folder: expected a folder, got {str(path)!r}, which does not exist")
    marks, changed_s = [], 0.0
    for name in FILES:
        try:
            status = (folder / name).stat()
            marks.append(f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}")
            changed_s = max(changed_s, status.st_mtime, status.st_ctime)
        except OSError:
            marks.append("absent")
    return ";".join(marks), changed_s


def _digests(path: Path) -> tuple[int, bytes]:
    """A file's size, and the SHA-256 of each of its pieces. Hashing and reading let other threads run."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(file, _PIECE, start)).digest()

        starts = range(0, size, _PIECE)
        if len(starts) <= 1:
            return size, b"".join(map(digest, starts))
        with ThreadPoolExecutor(min(_THREADS, len(starts)), thread_name_prefix="hash") as threads:
            return size, b"".join(threads.map(digest, starts))
    finally:
        os.close(file)
