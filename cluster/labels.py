"""Keeps metrics small: only the busiest adapters have a label value of their own."""

import threading
from collections import Counter
from collections.abc import Callable

BASE = "base"
OTHER = "other"
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HALVE_EVERY = 10_000  # observations, so that yesterday's adapters make room for today's


class AdapterLabels:
    """Maps adapter names to label values: at most `limit` names, the rest OTHER, and BASE for the base model.

    A newcomer takes the seat of the quietest once it is twice as busy; `dropped` is told, so that the old series can be
    removed. Any thread may call.
    """

    def __init__(self, limit: int, dropped: Callable[[str], None] = lambda name: None) -> None:
        self.limit = limit
        self._dropped = dropped
        self._seated: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._observed = 0
        self._lock = threading.Lock()

    def label(self, adapter: str | None, weight: int = 1) -> str:
        """The label value of `adapter` (None or "": the base), counting `weight` for it."""
        if not adapter:
            return BASE
        with self._lock:
            self._count(adapter, weight)
            if adapter in self._seated or len(self._seated) < self.limit:
                self._seated.add(adapter)
                return adapter
            quietest = min(self._seated, key=lambda name: self._counts[name])
            if self._counts[adapter] < 2 * self._counts[quietest] + _HALVE_EVERY // 100:
                return OTHER
            self._seated.remove(quietest)
            self._seated.add(adapter)
        self._dropped(quietest)
        return adapter

    def _count(self, adapter: str, weight: int) -> None:
        self._counts[adapter] += weight
        self._observed += 1
        if self._observed % _HALVE_EVERY == 0:
            self._counts = Counter({name: count // 2 for name, count in self._counts.items() if count > 1})
