"""Reads the files of a remote adapter with fsspec."""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec

from ranklet.replicas.adapters.reference import FILES, OPTIONAL_FILES
from ranklet.replicas.errors import AdapterNotFound, InvalidRequest, RankletError, Unavailable

_CHUNK_BYTES = 8 << 20
_MD5 = re.compile("[0-9a-f]{32}")
_NO_SUCH_FILE = (401, 403, 404, 410)  # HTTP statuses


@dataclass(frozen=True)
class FileMark:
    """Metadata of a remote file that changes with its content.

    Attributes:
        size: in bytes; None if the source does not report it.
        key: ETag, blob id or modification time; "" if the source reports none of them.
        md5: of the content; "" if the source does not report it.
    """

    size: int | None
    key: str
    md5: str = ""

    @classmethod
    def of(cls, info: dict[str, Any]) -> "FileMark":
        """Convert a result of fsspec's `info`, whose keys depend on the file system."""
        tag = str(info.get("ETag") or info.get("etag") or "").strip('"')
        others = (info.get(name) for name in ("blob_id", "crc32c", "LastModified", "Last-Modified", "mtime"))
        is_md5 = _MD5.fullmatch(tag) and "StorageClass" in info  # S3, for files that were not uploaded in parts
        return cls(info.get("size"), tag or str(next(filter(None, others), "")), tag if is_md5 else "")


class RemoteFolder:
    """The files of an adapter at a URL."""

    def __init__(self, url: str, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._files, self._path = fsspec.core.url_to_fs(url.rstrip("/"))
        self._chunk_bytes = chunk_bytes

    def marks(self) -> dict[str, FileMark]:
        """Return the current mark of each file, not one cached by fsspec."""
        self._files.invalidate_cache()
        found = {name: self._mark(name) for name in FILES}
        with ThreadPoolExecutor(len(OPTIONAL_FILES), thread_name_prefix="marks") as threads:
            marks = zip(OPTIONAL_FILES, threads.map(self._optional_mark, OPTIONAL_FILES), strict=True)
            return found | {name: mark for name, mark in marks if mark is not None}

    def _optional_mark(self, name: str) -> FileMark | None:
        try:
            return self._mark(name)
        except (FileNotFoundError, PermissionError) as error:  # without permission to list, S3 denies missing files
            if not _is_answer(error):
                raise
            return None

    def _mark(self, name: str) -> FileMark:
        return FileMark.of(self._files.info(f"{self._path}/{name}"))

    def read(self, name: str, start: int) -> Iterator[bytes]:
        """Yield the chunks of a file from byte `start` on."""
        with self._files.open(f"{self._path}/{name}", "rb") as file:
            file.seek(start)
            while chunk := file.read(self._chunk_bytes):
                yield chunk


def _is_answer(error: OSError) -> bool:
    """Return whether the source has said that there is no such file.

    Over HTTP, fsspec raises FileNotFoundError for any failure, with the failure as its cause.
    """
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    is_http = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return not is_http or getattr(cause, "status", None) in _NO_SUCH_FILE


@contextlib.contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Convert exceptions, which differ between file systems, to RankletErrors."""
    try:
        yield
    except RankletError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP, fsspec raises FileNotFoundError for an unreachable server too
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise Unavailable(f"{url} cannot be read now: {cause}. Try again") from error
        raise AdapterNotFound(f"{url}: expected {' and '.join(FILES)}, not found: {error}", param="path") from error
    except PermissionError as error:
        raise AdapterNotFound(f"{url}: this node has no permission to read it: {error}", param="path") from error
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"path: {url} cannot be read here: {error}", param="path") from error
    except Exception as error:
        raise Unavailable(f"{url} cannot be read now: {type(error).__name__}: {error}. Try again") from error
