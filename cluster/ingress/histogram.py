"""Histograms whose observations have weights, and whose sum over all adapters can be exported as well."""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

from prometheus_client.utils import floatToGoString


class HistogramState(NamedTuple):
    """Upper bounds, each with the number of observations up to it, and the sum of all observations."""

    buckets: list[tuple[str, float]]
    total: float


class WeightedHistogram:
    """Counts observations by upper bound. Thread-safe.

    Each token is observed. prometheus-client's histogram has no weights, and takes three times as long.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, weight: int = 1) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += weight
            self._total += value * weight

    def state(self) -> HistogramState:
        with self._lock:
            counts, total = self._counts.copy(), self._total
        names = map(floatToGoString, (*self._bounds, inf))
        return HistogramState(list(zip(names, map(float, accumulate(counts)), strict=True)), total)


class AdapterHistogram:
    """A histogram for each value of the `adapter` label. Thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._by_label: dict[str, WeightedHistogram] = {}
        self._dropped: list[HistogramState] = []
        self._lock = threading.Lock()

    def observe(self, label: str, value: float) -> None:
        with self._lock:
            histogram = self._by_label.get(label)
            if histogram is None:
                histogram = self._by_label[label] = WeightedHistogram(self._bounds)
            histogram.observe(value)

    def drop(self, label: str) -> None:
        """Remove the series of a label. `all` keeps its observations, so that its counts never fall."""
        with self._lock:
            if (histogram := self._by_label.pop(label, None)) is not None:
                self._dropped = [_sum([*self._dropped, histogram.state()])]

    def by_label(self) -> dict[str, HistogramState]:
        with self._lock:
            return {label: histogram.state() for label, histogram in self._by_label.items()}

    def all(self) -> HistogramState:
        """Return the sum of all adapters since the start."""
        with self._lock:
            states = [*self._dropped, *(histogram.state() for histogram in self._by_label.values())]
        return _sum(states or [WeightedHistogram(self._bounds).state()])


def _sum(states: Sequence[HistogramState]) -> HistogramState:
    names = [name for name, _ in states[0].buckets]
    counts = [sum(count for _, count in rows) for rows in zip(*(state.buckets for state in states), strict=True)]
    return HistogramState(list(zip(names, counts, strict=True)), sum(state.total for state in states))
