"""Resolves the location of an adapter to its current revision and its folder on this node."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.source import is_remote
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions, age_of
from ranklet.replicas.errors import StillLoading

_FOLDER_THREADS = 32
_DOWNLOAD_THREADS = 8
_CHECK_INTERVAL_S = 1.0  # between two checks of an adapter's files
_CHECK_WAIT_S = 0.2  # a request for a known adapter waits this long for a check, then uses the known revision
_SETTLE_S = 1.0  # files written more recently may be incomplete, so the known revision is used until then
_Key = tuple[str, str]  # name and source


@dataclass(frozen=True)
class ResolvedAdapter:
    """The current revision of an adapter on this node."""

    adapter: AdapterRef
    downloaded: bool = False  # by the call that resolved it


class AdapterResolver:
    """Checks folders and downloads remote adapters, on threads. Concurrent requests for an adapter share one check.

    Args:
        timeout_s: how long a request waits for the first check of an adapter.
        clock: monotonic, in seconds.
    """

    def __init__(self, cache: RemoteCache, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self._timeout_s = timeout_s
        self._clock = clock
        self._revisions = Revisions()
        self._known: dict[_Key, tuple[float, AdapterRef]] = {}
        self._checks: dict[_Key, asyncio.Future[ResolvedAdapter]] = {}
        self._folder_threads = ThreadPoolExecutor(_FOLDER_THREADS, thread_name_prefix="check")
        self._download_threads = ThreadPoolExecutor(_DOWNLOAD_THREADS, thread_name_prefix="download")

    def invalidate(self, name: str) -> None:
        """Forget the known revision. Only requests that already wait get the result of a running check."""
        for kept in (self._known, self._checks):
            for key in [key for key in kept if key[0] == name]:
                del kept[key]

    async def resolve(self, name: str, source: str) -> ResolvedAdapter:
        """Return the adapter's current revision. Checks its files at most once a second.

        While a disk or a remote source hangs, this returns the revision of the last check, if there was one.

        Raises:
            AdapterNotFound: the folder does not exist.
            StillLoading: the first check exceeds `timeout_s`.
            RankletError: see `RemoteCache.fetch`.
        """
        key = name, source
        checked_s, known = self._known.get(key, (float("-inf"), None))
        if known is not None and self._clock() - checked_s <= _CHECK_INTERVAL_S:
            return ResolvedAdapter(known)
        check = self._checks.get(key) or self._start_check(key)
        wait_s = _CHECK_WAIT_S if known else self._timeout_s
        await asyncio.wait([check], timeout=wait_s)
        if check.done():
            return check.result()
        if known is not None:
            return ResolvedAdapter(known)
        slow = "its download" if is_remote(source) else "the disk"
        raise StillLoading(
            f"adapter {name!r}: expected its files within {wait_s:g} s, but {slow} has not finished. Try again"
        )

    def _start_check(self, key: _Key) -> "asyncio.Future[ResolvedAdapter]":
        loop = asyncio.get_running_loop()
        if is_remote(key[1]):
            future = loop.run_in_executor(self._download_threads, self._download, *key)
        else:
            future = loop.run_in_executor(self._folder_threads, self._check_folder, *key)
        self._checks[key] = future
        future.add_done_callback(lambda done: self._finish_check(key, done))
        return future

    def _check_folder(self, name: str, folder: str) -> ResolvedAdapter:
        _, known = self._known.get((name, folder), (0.0, None))
        if known is not None and 0 <= age_of(folder) < _SETTLE_S:
            return ResolvedAdapter(known)
        return ResolvedAdapter(self._revisions.reference(name, folder))

    def _download(self, name: str, source: str) -> ResolvedAdapter:
        fetched = self._cache.fetch(source)
        return ResolvedAdapter(AdapterRef(name, str(fetched.folder), fetched.revision), fetched.downloaded)

    def _finish_check(self, key: _Key, check: "asyncio.Future[ResolvedAdapter]") -> None:
        if self._checks.get(key) is not check:  # invalidated
            return
        del self._checks[key]
        if not check.cancelled() and check.exception() is None:
            self._known[key] = self._clock(), check.result().adapter
