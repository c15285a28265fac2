"""Which revision of an adapter is on this node, and in which folder; whatever is slow is done off the event loop."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ranklet.cluster.catalog.remote import RemoteCache, is_remote
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.revision import Revisions, age_of
from ranklet.replicas.errors import StillLoading

_LOOKERS = 32  # folders looked at at once
_FETCHERS = 8  # adapters that are elsewhere, fetched at once
_LOOK_S = 0.2  # a known adapter's request waits so long for news of its folder
_HOLDS_S = 1.0  # how long a revision is believed before the files are looked at again
_SETTLES_S = 1.0  # files that somebody wrote so lately may not all be there: what was known goes on until then
_Key = tuple[str, str]  # name and place


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter as it is on this node."""

    adapter: AdapterRef
    downloaded: bool = False  # for this look


class AdapterResolver:
    """Looks at folders, and fetches what is elsewhere, once for all who ask at the same time.

    Args:
        timeout_s: how long a request waits for an adapter that is not known yet.
    """

    def __init__(self, sources: RemoteCache, timeout_s: float) -> None:
        self._sources = sources
        self._timeout_s = timeout_s
        self._revisions = Revisions()
        self._known: dict[_Key, tuple[float, AdapterRef]] = {}
        self._looks: dict[_Key, asyncio.Future[ResolvedAdapter]] = {}
        self._lookers = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch")

    def invalidate(self, name: str) -> None:
        """Look anew when this adapter is next asked for; a look that has begun tells those alone who wait for it."""
        for kept in (self._known, self._looks):
            for key in [key for key in kept if key[0] == name]:
                del kept[key]

    async def resolve(self, name: str, place: str) -> ResolvedAdapter:
        """The adapter's present revision; its files are looked at once a second.

        A disk or a source that hangs holds up requests for adapters that are there and not yet known; those that are
        keep the revision last seen.

        Raises:
            RankletError: AdapterNotFound, StillLoading, or as `RemoteCache.fetch` says.
        """
        key = name, place
        checked_s, known = self._known.get(key, (float("-inf"), None))
        if known is not None and time.monotonic() - checked_s <= _HOLDS_S:
            return ResolvedAdapter(known)
        look = self._looks.get(key)
        if look is None:
            pool = self._fetchers if is_remote(place) else self._lookers
            look = self._looks[key] = asyncio.get_running_loop().run_in_executor(pool, self._look, *key)
            look.add_done_callback(lambda done: self._looked(key, done))
        patience_s = _LOOK_S if known else self._timeout_s
        await asyncio.wait([look], timeout=patience_s)
        if look.done():
            return look.result()
        if known is None:
            what = "its download" if is_remote(place) else "the disk"
            raise StillLoading(
                f"adapter {name!r}: expected its files within {patience_s:g} s, but {what} has not finished. Try again"
            )
        return ResolvedAdapter(known)

    def _look(self, name: str, place: str) -> ResolvedAdapter:
        if not is_remote(place):
            known = self._known.get((name, place))
            if known is not None and 0 <= age_of(place) < _SETTLES_S:
                return ResolvedAdapter(known[1])
            return ResolvedAdapter(self._revisions.reference(name, place))
        fetched = self._sources.fetch(place)
        return ResolvedAdapter(AdapterRef(name, str(fetched.folder), fetched.revision), fetched.downloaded)

    def _looked(self, key: _Key, look: "asyncio.Future[ResolvedAdapter]") -> None:
        if self._looks.get(key) is not look:
            return  # forgotten meanwhile
        del self._looks[key]
        if not look.cancelled() and look.exception() is None:
            self._known[key] = time.monotonic(), look.result().adapter
