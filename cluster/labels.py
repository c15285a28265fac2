"""Bounds the number of series: only the busiest adapters have a label value of their own.

The label of an adapter is its name. `name:` precedes a name that would look like another label: BASE, OTHER, UNKNOWN,
and a name that starts with `name:` itself.
"""

import threading
from collections import Counter
from collections.abc import Callable

BASE = "base"
OTHER = "other"
UNKNOWN = "unknown"  # of requests that are refused before their model is known
_ESCAPE = "name:"
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HALVE_EVERY = 10_000  # observations, so that adapters that are no longer used lose their label
_MARGIN = 100  # of count, so that labels do not change at the start


class AdapterLabels:
    """Maps adapter names to label values: up to `limit` names, OTHER for other adapters, BASE for the base model.

    A busy adapter replaces the least busy labelled one when its count is twice as large, plus 100. Thread-safe.

    Args:
        on_drop: called with the replaced label, so that its series can be removed.
    """

    def __init__(self, limit: int, on_drop: Callable[[str], None] = lambda name: None) -> None:
        self.limit = limit
        self._on_drop = on_drop
        self._labelled: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._observed = 0
        self._lock = threading.Lock()

    def label(self, adapter: str | None, weight: int = 1) -> str:
        """Return the label value of an adapter; None or "" is the base model. Adds `weight` to its count."""
        if not adapter:
            return BASE
        if adapter in (BASE, OTHER, UNKNOWN) or adapter.startswith(_ESCAPE):
            adapter = _ESCAPE + adapter
        with self._lock:
            self._count(adapter, weight)
            if adapter in self._labelled or len(self._labelled) < self.limit:
                self._labelled.add(adapter)
                return adapter
            least_busy = min(self._labelled, key=lambda name: self._counts[name])
            if self._counts[adapter] < 2 * self._counts[least_busy] + _MARGIN:
                return OTHER
            self._labelled.remove(least_busy)
            self._labelled.add(adapter)
        self._on_drop(least_busy)
        return adapter

    def current(self, label: str) -> str:
        """Return a label that `label` returned earlier, or OTHER if another adapter has replaced it since."""
        return label if label == BASE or label in self._labelled else OTHER

    def _count(self, adapter: str, weight: int) -> None:
        self._counts[adapter] += weight
        self._observed += 1
        if self._observed % _HALVE_EVERY == 0:
            self._counts = Counter({name: count // 2 for name, count in self._counts.items() if count > 1})
