"""Downloads remote adapters (`s3://`, `gs://`, `hf://`, `https://`) once per node into a bounded cache.

A source is a URL and, once the adapter has been loaded by name, its revision after a `#`. Each node gets that content
or an error. All processes of a node share the cache. A download holds a lock; a rename publishes the complete entry.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ranklet.cluster.catalog.remote_folder import FileMark, RemoteFolder, translated_errors
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import InvalidAdapter, Unavailable

_ENTRY_FILE = "source.json"
_MARKS_FILE = "marks.json"  # in the folder of an unfinished download
_KEEP_USED_S = 300.0


@dataclass(frozen=True)
class RemoteAdapter:
    """Content of the entry file, which makes an entry complete."""

    url: str
    revision: str
    bytes: int
    marks: dict[str, Any]


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter's folder in the cache."""

    folder: Path
    revision: str
    downloaded: bool  # by this call


class RemoteCache:
    """The cache of one node.

    Args:
        root: its folder, made at first use. It must not contain anything else.
        max_bytes: limit on the size of all entries. The least recently used ones are evicted.
        max_adapter_bytes: limit on the size of one entry.
        on_download: called after each download with its URL, seconds and bytes.
        keep_used_s: entries used more recently are not evicted, because an engine may be reading them.
        open_folder: opens a URL.
    """

    def __init__(
        self, root: Path, max_bytes: int, max_adapter_bytes: int,
        on_download: Callable[[str, float, int], None] = lambda url, seconds, size: None, *,
        keep_used_s: float = _KEEP_USED_S, open_folder: Callable[[str], RemoteFolder] = RemoteFolder,
    ) -> None:  # fmt: skip
        self.root = root
        self.max_adapter_bytes = max_adapter_bytes
        self._max_bytes = max_bytes
        self._on_download = on_download
        self._keep_used_s = keep_used_s
        self._open_folder = open_folder

    def find(self, source: str) -> FetchedAdapter | None:
        """Return the folder of a remote adapter if the cache has the revision that `source` contains."""
        url, _, revision = source.partition("#")
        return self._use(_key_of(url), revision) if revision else None

    def fetch(self, source: str) -> FetchedAdapter:
        """Return the folder of a remote adapter. Blocks during a download; resumes an interrupted one.

        Raises:
            AdapterNotFound: there are no such files.
            InvalidAdapter: the adapter is too large, or no longer has the revision that `source` contains.
            InvalidRequest: no file system for this kind of URL is installed.
            Unavailable: the remote source does not answer.
        """
        url, _, revision = source.partition("#")
        key = _key_of(url)
        if found := self.find(source):
            return found
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked(key):
            if revision and (found := self._use(key, revision)):  # another process has just downloaded it
                return found
            fetched = self._find_or_download(key, url)
            self._evict()
        if revision and fetched.revision != revision:
            raise InvalidAdapter(
                url, [f"expected revision {revision}, which was loaded, got {fetched.revision}. Load it again by name"]
            )
        return fetched

    def _find_or_download(self, key: str, url: str) -> FetchedAdapter:
        began_s = time.monotonic()
        with translated_errors(url):
            remote = self._open_folder(url)
            marks = remote.marks()
        if _identify_content(marks):
            for entry in self._entries(key):
                if entry.marks == _as_dicts(marks) and (found := self._use(key, entry.revision)):
                    return found
        entry = self._download(key, url, remote, marks)
        self._on_download(url, time.monotonic() - began_s, entry.bytes)
        return FetchedAdapter(self._folder(key, entry.revision), entry.revision, downloaded=True)

    def _folder(self, key: str, revision: str) -> Path:
        return self.root / f"{key}-{revision}"

    def _use(self, key: str, revision: str) -> FetchedAdapter | None:
        """Mark an entry as just used, which protects it from eviction. Returns None if it is not complete."""
        folder = self._folder(key, revision)
        try:
            os.utime(folder / _ENTRY_FILE)
        except FileNotFoundError:
            return None
        return FetchedAdapter(folder, revision, downloaded=False)

    def _entries(self, key: str) -> list[RemoteAdapter]:
        found = []
        for path in self.root.glob(f"{key}*/{_ENTRY_FILE}"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(RemoteAdapter(**json.loads(path.read_text())))
        return found

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, key: str, url: str, remote: RemoteFolder, marks: dict[str, FileMark]) -> RemoteAdapter:
        self._check_size(url, sum(mark.size or 0 for mark in marks.values()))
        part = self._prepare_part(key, marks)
        total = 0
        with translated_errors(url):
            for name, mark in marks.items():
                total += self._copy(url, remote, name, mark, part / name, total)
            if remote.marks() != marks:
                shutil.rmtree(part)
                raise Unavailable(f"{url} changed during the download. Try again")
        entry = RemoteAdapter(url, revision_of(part), total, _as_dicts(marks))
        (part / _MARKS_FILE).unlink()
        (part / _ENTRY_FILE).write_text(json.dumps(asdict(entry), indent=1))
        folder = self._folder(key, entry.revision)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
        return entry

    def _prepare_part(self, key: str, marks: dict[str, FileMark]) -> Path:
        """Return the folder of the download. Keeps files of an interrupted download of the same content."""
        part = self.root / f"{key}.part"
        path, content = part / _MARKS_FILE, _as_dicts(marks)
        with contextlib.suppress(OSError, ValueError):  # no download to resume, or its marks are incomplete
            if _identify_content(marks) and json.loads(path.read_text()) == content:
                return part
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        path.write_text(json.dumps(content))
        return part

    def _copy(self, url: str, remote: RemoteFolder, name: str, mark: FileMark, target: Path, other_bytes: int) -> int:
        target.parent.mkdir(exist_ok=True)
        had = target.stat().st_size if target.exists() and mark.size is not None else 0
        with target.open("ab" if had else "wb") as file:
            for chunk in remote.read(name, had):
                file.write(chunk)
                self._check_size(url, other_bytes + file.tell())
        size = target.stat().st_size
        # MD5 is checked only after a resumed download: with some server-side encryption the ETag is not an MD5.
        if size != (mark.size or size) or (had and mark.md5 and _md5_of(target) != mark.md5):
            target.unlink()
            raise OSError(f"{name}: expected {mark.size} bytes with MD5 {mark.md5 or 'any'}, got {size} other bytes")
        return size

    def _check_size(self, url: str, size: int) -> None:
        if size > self.max_adapter_bytes:
            raise InvalidAdapter(
                url, [f"expected at most {self.max_adapter_bytes} bytes (sources.max_adapter_bytes), got {size}"]
            )

    def _evict(self) -> None:
        with self._locked("evict"):
            entries = [(path.stat().st_mtime, path.parent) for path in self.root.glob(f"*/{_ENTRY_FILE}")]
            sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in entries}
            total = sum(sizes.values())
            for used_s, folder in sorted(entries):
                if total <= self._max_bytes or time.time() - used_s < self._keep_used_s:
                    return
                total -= sizes[folder]
                gone = folder.with_suffix(".gone")
                folder.replace(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _key_of(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


def _identify_content(marks: dict[str, FileMark]) -> bool:
    """Return whether files with equal marks have equal content."""
    return all(mark.key for mark in marks.values())


def _as_dicts(marks: dict[str, FileMark]) -> dict[str, Any]:
    return {name: asdict(mark) for name, mark in marks.items()}


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
