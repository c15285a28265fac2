"""Reads the files of a remote adapter with fsspec."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import aiohttp
import fsspec

from ranklet.cluster.catalog.source import check_url_allowed
from ranklet.replicas.adapters.reference import FILES, LISTED_FILES, LISTING_FILE, OPTIONAL_FILES
from ranklet.replicas.errors import AdapterNotFound, InvalidRequest, RankletError, Unavailable

_CHUNK_BYTES = 8 << 20
_MD5 = re.compile("[0-9a-f]{32}")
_HTTP = ("http://", "https://")
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
    """The files of an adapter at a URL.

    Args:
        allowed: prefixes of the URLs that HTTP redirects may lead to.
    """

    def __init__(self, url: str, chunk_bytes: int = _CHUNK_BYTES, allowed: tuple[str, ...] = ()) -> None:
        options = _checked_redirects(allowed) if url.startswith(_HTTP) else {}
        self._files, self._path = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        self._chunk_bytes = chunk_bytes

    def marks(self) -> dict[str, FileMark]:
        """Return the current mark of each file, not one cached by fsspec."""
        self._files.invalidate_cache()
        found = {name: self._mark(name) for name in FILES}
        found |= self._optional_marks([name for name in OPTIONAL_FILES if name not in LISTED_FILES])
        return found | self._optional_marks(LISTED_FILES) if LISTING_FILE in found else found

    def _optional_marks(self, names: Sequence[str]) -> dict[str, FileMark]:
        with ThreadPoolExecutor(len(names), thread_name_prefix="marks") as threads:
            marks = zip(names, threads.map(self._optional_mark, names), strict=True)
            return {name: mark for name, mark in marks if mark is not None}

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


def _checked_redirects(allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return options of fsspec's HTTP file system that check where a redirect leads before it is followed."""

    async def check(session: Any, context: Any, redirect: aiohttp.TraceRequestRedirectParams) -> None:
        headers = redirect.response.headers
        check_url_allowed(urljoin(str(redirect.url), headers.get("Location") or headers.get("URI") or ""), allowed)

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    return {"client_kwargs": {"trace_configs": [trace]}, "skip_instance_cache": True}


def _is_answer(error: OSError) -> bool:
    """Return whether the source has said that there is no such file.

    Over HTTP, fsspec raises FileNotFoundError for any failure, with the failure as its cause.
    """
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    if isinstance(cause, RankletError):  # of a redirect
        return False
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
        cause = error.__cause__
        if isinstance(cause, RankletError):
            raise cause from error
        # Over HTTP, fsspec raises FileNotFoundError for an unreachable server too.
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise Unavailable(f"{url} cannot be read now: {cause}. Try again") from error
        raise AdapterNotFound(f"{url}: expected {' and '.join(FILES)}, not found: {error}", param="path") from error
    except PermissionError as error:
        raise AdapterNotFound(f"{url}: this node has no permission to read it: {error}", param="path") from error
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"path: {url} cannot be read here: {error}", param="path") from error
    except Exception as error:
        raise Unavailable(f"{url} cannot be read now: {type(error).__name__}: {error}. Try again") from error
