"""Adapters that lie elsewhere (`s3://`, `gs://`, `hf://`, `https://`), fetched once per node into a bounded cache.

A place is a URL and, once it has been loaded, its revision behind a `#`. A node that fetches it later gets that content
or none. All processes of a node share the cache: a download holds a lock, and what is complete appears by a rename.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from ranklet.replicas.adapters.reference import FILES
from ranklet.replicas.adapters.revision import revision_of
from ranklet.replicas.errors import AdapterNotFound, InvalidAdapter, InvalidRequest, RankletError, Unavailable

_ABOUT = "source.json"
_CHUNK = 8 << 20
_MD5 = re.compile("[0-9a-f]{32}")
_JUST_USED_S = 300.0  # what was asked for so lately is not evicted: an engine may be reading it


def is_remote(place: str) -> bool:
    """Whether a place is a URL, not a folder."""
    return "://" in place


def pinned_revision(place: str) -> str:
    """The revision behind a URL's `#`, "" if there is none."""
    return place.partition("#")[2]


def check_url_allowed(url: str, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless a URL lies under one of the prefixes `allowed`."""
    tricks = any(part in url for part in ("..", "::", "#", "?", "%", "\\", "@", "\n"))
    under = any(url.startswith(prefix.rstrip("/") + "/") for prefix in allowed)
    if tricks or not under:
        prefixes = ", ".join(allowed) or "nothing"
        raise InvalidRequest(
            f"path: expected a folder, or a URL under what sources.allowed names ({prefixes}), got {url!r}",
            param="path",
        )


@dataclass(frozen=True)
class FileMark:
    """What a remote file looked like: it has changed when this has."""

    size: int | None
    key: str  # its ETag, blob id or time, as its file system tells; "" where none does
    md5: str = ""  # of its content, if the source says so

    @classmethod
    def of(cls, told: dict[str, Any]) -> "FileMark":
        """From what fsspec's `info` tells, each file system in its own words."""
        tag = str(told.get("ETag") or told.get("etag") or "").strip('"')
        others = (told.get(name) for name in ("blob_id", "crc32c", "LastModified", "Last-Modified", "mtime"))
        is_md5 = _MD5.fullmatch(tag) and "StorageClass" in told  # of S3, for what was not uploaded in parts
        return cls(told.get("size"), tag or str(next(filter(None, others), "")), tag if is_md5 else "")


@dataclass(frozen=True)
class RemoteAdapter:
    """Beside the files of a complete entry."""

    url: str
    revision: str
    bytes: int
    marks: dict[str, Any]


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter's folder on this node."""

    folder: Path
    revision: str
    downloaded: bool  # just now, and not found in the cache


class RemoteCache:
    """One node's cache.

    Args:
        root: its folder, made when first needed. Nothing else may be in it.
        most_bytes: of all entries together; the least recently used go.
        most_adapter_bytes: of one.
        told: is told each download: its URL, seconds, bytes.
    """

    def __init__(
        self, root: Path, most_bytes: int, most_adapter_bytes: int,
        told: Callable[[str, float, int], None] = lambda url, seconds, size: None,
    ) -> None:  # fmt: skip
        self._root = root
        self._most_bytes = most_bytes
        self._most_adapter_bytes = most_adapter_bytes
        self._told = told

    def fetch(self, place: str) -> FetchedAdapter:
        """The folder of an adapter; blocks while it is downloaded. A download that broke off is taken up again.

        Raises:
            AdapterNotFound: there is nothing at this URL.
            InvalidAdapter: it is too large, or is not of the revision that the place names any more.
            InvalidRequest: no file system for this kind of URL is installed.
            Unavailable: the source does not answer.
        """
        url, _, wanted = place.partition("#")
        key = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        if wanted and (found := self._complete(key, wanted)):
            return found
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked(key):
            if wanted and (found := self._complete(key, wanted)):  # meanwhile
                return found
            began_s = time.monotonic()
            with _translated(url):
                remote = _RemoteFolder(url)
                marks = remote.marks()
            known = self._entries(key) if _tell_changes(marks) else []
            about = next((each for each in known if each.marks == _plain(marks)), None)
            downloaded = about is None
            if about is None:
                about = self._download(key, url, remote, marks)
                self._told(url, time.monotonic() - began_s, about.bytes)
            self._evict()
        if wanted and about.revision != wanted:
            raise InvalidAdapter(
                url, [f"it has changed: {wanted} was loaded, {about.revision} is there now. Load it again by name"]
            )
        return self._used(key, about.revision, downloaded=downloaded)

    def _folder(self, key: str, revision: str) -> Path:
        return self._root / f"{key}-{revision}"

    def _complete(self, key: str, revision: str) -> FetchedAdapter | None:
        return self._used(key, revision) if (self._folder(key, revision) / _ABOUT).exists() else None

    def _used(self, key: str, revision: str, *, downloaded: bool = False) -> FetchedAdapter:
        folder = self._folder(key, revision)
        (folder / _ABOUT).touch()
        return FetchedAdapter(folder, revision, downloaded)

    def _entries(self, key: str) -> list[RemoteAdapter]:
        found = []
        for path in self._root.glob(f"{key}*/{_ABOUT}"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(RemoteAdapter(**json.loads(path.read_text())))
        return found

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, key: str, url: str, remote: "_RemoteFolder", marks: dict[str, FileMark]) -> RemoteAdapter:
        """All files into a folder of their own; what an earlier try has left of the same files is kept."""
        self._refuse_large(url, 0, sum(mark.size or 0 for mark in marks.values()))
        part = self._root / f"{key}.part"
        begun = part / "marks.json"
        if not (_tell_changes(marks) and begun.exists() and json.loads(begun.read_text()) == _plain(marks)):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            begun.write_text(json.dumps(_plain(marks)))
        total = 0
        for name, mark in marks.items():
            with _translated(url):
                remote.copy(name, mark, part / name, partial(self._refuse_large, url, total))
            total += (part / name).stat().st_size
        with _translated(url):
            if remote.marks() != marks:
                shutil.rmtree(part)
                raise Unavailable(f"{url} changed while it was fetched. Try again")
        about = RemoteAdapter(url, revision_of(part), total, _plain(marks))
        begun.unlink()
        (part / _ABOUT).write_text(json.dumps(asdict(about), indent=1))
        folder = self._folder(key, about.revision)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
        return about

    def _refuse_large(self, url: str, others: int, size: int) -> None:
        size += others
        if size > self._most_adapter_bytes:
            raise InvalidAdapter(
                url, [f"expected at most {self._most_adapter_bytes} bytes (sources.max_adapter_bytes), got {size}"]
            )

    def _evict(self) -> None:
        """Make room, the least recently used first."""
        with self._locked("evict"):
            entries = [(path.stat().st_mtime, path.parent) for path in self._root.glob(f"*/{_ABOUT}")]
            sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for _, folder in entries}
            total = sum(sizes.values())
            for used_s, folder in sorted(entries):
                if total <= self._most_bytes or time.time() - used_s < _JUST_USED_S:
                    return
                total -= sizes[folder]
                gone = folder.with_suffix(".gone")
                folder.replace(gone)
                shutil.rmtree(gone, ignore_errors=True)


class _RemoteFolder:
    """The files of an adapter at a URL."""

    def __init__(self, url: str) -> None:
        self._files, self._path = fsspec.core.url_to_fs(url.rstrip("/"))

    def marks(self) -> dict[str, FileMark]:
        """What each file looks like now, asked anew."""
        self._files.invalidate_cache()
        marks = {}
        for name in FILES:
            marks[name] = FileMark.of(self._files.info(f"{self._path}/{name}"))
        return marks

    def copy(self, name: str, mark: FileMark, target: Path, grown: Callable[[int], None]) -> None:
        """The rest of a file behind what `target` has of it already; `grown` is told the size, and may refuse it."""
        had = target.stat().st_size if target.exists() and mark.size is not None else 0
        with self._files.open(f"{self._path}/{name}", "rb") as source, target.open("ab" if had else "wb") as file:
            source.seek(had)
            while chunk := source.read(_CHUNK):
                file.write(chunk)
                grown(file.tell())
        got = target.stat().st_size
        with target.open("rb") as file:
            # Of a file fetched in one go nothing is proven by another sum: with some encryption, tags are no sums.
            sound = not had or not mark.md5 or hashlib.file_digest(file, "md5").hexdigest() == mark.md5
        if got != (mark.size or got) or not sound:
            target.unlink()
            raise OSError(f"{name}: expected {mark.size} bytes of MD5 {mark.md5 or 'any'}, got {got} others")


def _tell_changes(marks: dict[str, FileMark]) -> bool:
    """Whether equal marks mean equal files."""
    return all(mark.key for mark in marks.values())


def _plain(marks: dict[str, FileMark]) -> dict[str, Any]:
    return {name: asdict(mark) for name, mark in marks.items()}


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Failures of file systems, each with its own exceptions, in ranklet's words."""
    try:
        yield
    except RankletError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP, a server that is not there is a file that is not there
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise Unavailable(f"{url} cannot be read now: {cause}. Try again") from error
        raise AdapterNotFound(
            f"{url}: expected {' and '.join(FILES)} there, not found: {error}", param="path"
        ) from error
    except PermissionError as error:
        raise AdapterNotFound(f"{url}: this node may not read it: {error}", param="path") from error
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"path: {url} cannot be read here: {error}", param="path") from error
    except Exception as error:
        raise Unavailable(f"{url} cannot be read now: {type(error).__name__}: {error}. Try again") from error
