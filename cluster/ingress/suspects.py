"""Adapters that were loading when an engine died. They are not tried on other engines for a while."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.replicas.errors import AdapterLoadCrashed

# After the first death, the second, and all further ones. An adapter that happened to load when an engine was killed is
# served again soon; one that kills each engine costs few.
_WAITS_S = (10.0, 60.0, 600.0)
_FORGET_S = 3600.0
_MAX_KEPT = 1024
_Key = tuple[str, str]  # name and source


@dataclass(frozen=True)
class _Suspicion:
    deaths: int
    last_s: float

    @property
    def until_s(self) -> float:
        return self.last_s + _WAITS_S[min(self.deaths, len(_WAITS_S)) - 1]


class Suspects:
    """The suspects that one gateway knows.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[_Key, _Suspicion] = {}

    def add(self, name: str, source: str) -> None:
        """Record that an engine died while it loaded an adapter. Several requests may report the same death."""
        now_s, known = self._clock(), self._known.pop((name, source), _Suspicion(0, float("-inf")))
        if now_s < known.until_s:
            self._known[name, source] = known
            return
        deaths = known.deaths + 1 if now_s - known.last_s < _FORGET_S else 1
        self._known[name, source] = _Suspicion(deaths, now_s)
        if len(self._known) > _MAX_KEPT:
            del self._known[next(iter(self._known))]

    def clear(self, name: str) -> None:
        """Forget an adapter, which has been loaded by name."""
        for key in [key for key in self._known if key[0] == name]:
            del self._known[key]

    def check(self, adapter: AdapterLocation | None) -> None:
        """Raise AdapterLoadCrashed if an adapter must not be tried now."""
        known = None if adapter is None else self._known.get((adapter.name, adapter.source))
        if adapter is None or known is None or (wait_s := known.until_s - self._clock()) <= 0:
            return
        raise AdapterLoadCrashed(
            f"adapter {adapter.name!r}: an engine died while it loaded this adapter, which is not tried again for "
            f"{wait_s:.0f} s. Check it with `ranklet adapters verify`; a load by name tries it at once",
            param="model",
            retry_after_s=wait_s,
        )
