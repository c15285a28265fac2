"""The replicas that have a slot for each adapter, as reported or expected after a choice. By replica index."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.report import Holdings

_EXPECTED_LOAD_S = 10.0  # how long an adapter counts as loading at a replica that it was sent to
_NO_PLACES: Mapping[int, bool] = {}
_NO_HOLDINGS = Holdings(-1, frozenset(), frozenset(), frozenset(), 0, 0, 0)


class Placement:
    """The adapters in the slots of all replicas.

    Attributes:
        owned: float64 [replicas], adapters with a slot there, each counted as one over the number of its copies. A
            replica that owns as many as it has slots holds only adapters that no other replica has.
        hosts: replicas that have an adapter in host memory.
    """

    def __init__(self, replicas: int) -> None:
        self.owned: NDArray[np.float64] = np.zeros(replicas)
        self.hosts: dict[str, set[int]] = {}
        self._places: dict[str, dict[int, bool]] = {}  # by adapter: replica, and whether the adapter is ready there
        self._expected: dict[tuple[str, int], float] = {}  # (adapter, replica), since when

    def __len__(self) -> int:
        """Return the number of adapters that have a slot somewhere."""
        return len(self._places)

    def places(self, adapter: str) -> Mapping[int, bool]:
        """Return the replicas with a slot for an adapter: True if it is ready there, False if it is loading."""
        return self._places.get(adapter, _NO_PLACES)

    def update(self, i: int, before: Holdings | None, held: Holdings) -> frozenset[str]:
        """Set the adapters that replica `i` holds. Returns those for which something changed.

        Args:
            before: the replica's previous holdings, None at first.
        """
        before = before or _NO_HOLDINGS
        slots = (before.resident ^ held.resident) | (before.loading ^ held.loading)
        for name in slots:
            if name in held.resident or name in held.loading:
                self._expected.pop((name, i), None)
                self._add(name, i, ready=name in held.resident)
            elif (name, i) not in self._expected:
                self._remove(name, i)
        for name in before.hosted - held.hosted:
            self.hosts[name].discard(i)
            if not self.hosts[name]:
                del self.hosts[name]
        for name in held.hosted - before.hosted:
            self.hosts.setdefault(name, set()).add(i)
        return slots | (before.hosted ^ held.hosted)

    def expect_load(self, adapter: str, i: int, now_s: float) -> None:
        """Count an adapter as loading at replica `i`, if it has no slot there, until the replica reports it."""
        if i not in self.places(adapter):
            self._expected[adapter, i] = now_s
            self._add(adapter, i, ready=False)

    def expire(self, now_s: float) -> Iterable[str]:
        """Remove expected loads that were not reported in time. Returns their adapters."""
        old = [load for load, since_s in self._expected.items() if not 0 <= now_s - since_s <= _EXPECTED_LOAD_S]
        for name, i in old:
            del self._expected[name, i]
            self._remove(name, i)
        return {name for name, _ in old}

    def _add(self, name: str, i: int, *, ready: bool) -> None:
        places = self._places.setdefault(name, {})
        if i not in places:
            self._add_shares(places, -1.0)
            places[i] = ready
            self._add_shares(places, 1.0)
        places[i] = ready

    def _remove(self, name: str, i: int) -> None:
        places = self._places.get(name, {})
        if i in places:
            self._add_shares(places, -1.0)
            del places[i]
            self._add_shares(places, 1.0)
        if not places:
            self._places.pop(name, None)

    def _add_shares(self, places: Mapping[int, bool], sign: float) -> None:
        for holder in places:
            self.owned[holder] += sign / len(places)
