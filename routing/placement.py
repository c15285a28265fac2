"""Which adapters have a slot where, as replicas tell and as this router has arranged. Pure, by index of replica."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.report import Holdings

CLAIM_S = 10.0  # an adapter that was sent somewhere is taken to be on its way there for so long
_NOWHERE: Mapping[int, bool] = {}
_NOTHING = Holdings(-1, frozenset(), frozenset(), frozenset(), 0, 0, 0)


class Placement:
    """The slots of all replicas.

    Attributes:
        owned: float64 [replicas], adapters that a replica has a slot for, each shared evenly with all others that have
            one too: a replica that owns as many as it has slots has room for another at some adapter's cost only.
        hosts: replicas that have an adapter in host memory.
    """

    def __init__(self, replicas: int) -> None:
        self.owned: NDArray[np.float64] = np.zeros(replicas)
        self.hosts: dict[str, set[int]] = {}
        self._places: dict[str, dict[int, bool]] = {}  # by adapter: replica, and whether it is ready there
        self._claims: dict[tuple[str, int], float] = {}

    def __len__(self) -> int:
        """Adapters that have a slot somewhere."""
        return len(self._places)

    def places(self, adapter: str) -> Mapping[int, bool]:
        """Replicas with a slot for an adapter; true where it is ready, false where it is on its way."""
        return self._places.get(adapter, _NOWHERE)

    def told(self, i: int, before: Holdings | None, held: Holdings) -> frozenset[str]:
        """A replica tells what it holds, and told `before`; the adapters for which something changed."""
        before = before or _NOTHING
        slots = (before.resident ^ held.resident) | (before.coming ^ held.coming)
        for name in slots:
            there = name in held.resident or name in held.coming
            if there:
                self._claims.pop((name, i), None)
                self._enter(name, i, ready=name in held.resident)
            elif (name, i) not in self._claims:
                self._leave(name, i)
        for name in before.hosted - held.hosted:
            self.hosts[name].discard(i)
            if not self.hosts[name]:
                del self.hosts[name]
        for name in held.hosted - before.hosted:
            self.hosts.setdefault(name, set()).add(i)
        return slots | (before.hosted ^ held.hosted)

    def claim(self, adapter: str, i: int, now_s: float) -> None:
        """A request or an order for an adapter that is not there goes to replica `i`: it will come."""
        if i not in self.places(adapter):
            self._claims[adapter, i] = now_s
            self._enter(adapter, i, ready=False)

    def expire(self, now_s: float) -> Iterable[str]:
        """Forget claims that no replica has confirmed; their adapters."""
        old = [claim for claim, since_s in self._claims.items() if not 0 <= now_s - since_s <= CLAIM_S]
        for name, i in old:
            del self._claims[name, i]
            self._leave(name, i)
        return {name for name, _ in old}

    def _enter(self, name: str, i: int, *, ready: bool) -> None:
        places = self._places.setdefault(name, {})
        if i not in places:
            self._share(places, -1.0)
            places[i] = ready
            self._share(places, 1.0)
        places[i] = ready

    def _leave(self, name: str, i: int) -> None:
        places = self._places.get(name, {})
        if i in places:
            self._share(places, -1.0)
            del places[i]
            self._share(places, 1.0)
        if not places:
            self._places.pop(name, None)

    def _share(self, places: Mapping[int, bool], sign: float) -> None:
        for holder in places:
            self.owned[holder] += sign / len(places)
