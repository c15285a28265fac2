"""Resolves the location of an adapter to its current revision and its folder on this node."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranklet.cluster.catalog.lanes import Lanes
from ranklet.cluster.catalog.remote import RemoteCache
from ranklet.cluster.catalog.source import is_remote
from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.adapters.revision import Revisions, age_of, marks_of, read_invocation
from ranklet.replicas.adapters.safetensors_header import CutShortError, UnreadableWeightsError, read_header
from ranklet.replicas.errors import StillLoading

_CHECK_INTERVAL_S = 1.0  # between two checks of an adapter's files
_CHECK_WAIT_S = 0.2  # a request for a known adapter waits this long for a check, then uses the known revision
SETTLE_S = 1.0  # files written more recently may be incomplete: the known revision is used until then, or none
STALLED_S = 60.0  # a copy that stops within the weights for longer is not expected to go on
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
        roots: folders that links in an adapter's folder may lead to.
    """

    def __init__(
        self, cache: RemoteCache, timeout_s: float, clock: Callable[[], float] = time.monotonic,
        roots: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self._cache = cache
        self._timeout_s = timeout_s
        self._clock = clock
        self._revisions = Revisions(roots=roots, max_bytes=cache.max_adapter_bytes)
        self._known: dict[_Key, tuple[float, AdapterRef]] = {}
        self._checks: dict[_Key, asyncio.Task[ResolvedAdapter]] = {}
        self._lanes = Lanes()

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
            InvalidAdapter: a link leads out of the folder and of all roots, or the files are too large.
            StillLoading: the first check exceeds `timeout_s`, or the files are being written.
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

    def _start_check(self, key: _Key) -> "asyncio.Task[ResolvedAdapter]":
        name, source = key
        check = asyncio.ensure_future(self._download(name, source) if is_remote(source) else self._check_folder(key))
        self._checks[key] = check
        check.add_done_callback(lambda done: self._finish_check(key, done))
        return check

    async def _check_folder(self, key: _Key) -> ResolvedAdapter:
        name, folder = key
        deadline_s, marks = time.monotonic() + self._timeout_s, ""
        while time.monotonic() < deadline_s:
            found = await self._lanes.run(folder, self._look, name, folder, marks)
            if isinstance(found, ResolvedAdapter):
                return found
            marks = found
            await asyncio.sleep(SETTLE_S)
        raise StillLoading(f"adapter {name!r}: its files are still being written. Try again")

    def _look(self, name: str, folder: str, settled: str) -> "ResolvedAdapter | str":
        """Return the revision. If the files are being written, return the known one, or else their marks.

        Args:
            settled: marks that were there a second ago.
        """
        _, known = self._known.get((name, folder), (0.0, None))
        age_s = age_of(folder)
        if known is not None and (0 <= age_s < SETTLE_S or (age_s < STALLED_S and _weights_are_cut_short(folder))):
            return ResolvedAdapter(known)
        if known is None and age_s < SETTLE_S and (marks := marks_of(folder)) != settled:
            return marks
        return ResolvedAdapter(self._revisions.reference(name, folder))

    async def _download(self, name: str, source: str) -> ResolvedAdapter:
        fetched = await self._lanes.run(str(self._cache.root), self._cache.find, source)
        if fetched is None:
            fetched = await self._lanes.run(source, self._cache.fetch, source)
        invocation = await self._lanes.run(str(self._cache.root), read_invocation, fetched.folder)
        ref = AdapterRef(name, str(fetched.folder), fetched.revision, invocation=invocation)
        return ResolvedAdapter(ref, fetched.downloaded)

    def _finish_check(self, key: _Key, check: "asyncio.Task[ResolvedAdapter]") -> None:
        if self._checks.get(key) is not check:  # invalidated
            return
        del self._checks[key]
        if not check.cancelled() and check.exception() is None:
            self._known[key] = self._clock(), check.result().adapter


def _weights_are_cut_short(folder: str) -> bool:
    try:
        read_header(Path(folder) / WEIGHTS_FILE)
    except CutShortError:
        return True
    except UnreadableWeightsError:  # which a load reports
        pass
    return False
