"""The traffic of one adapter, and the number of homes that it needs. Callers pass the time.

Two decaying averages of work per second: a fast one, so that a sudden rush gets more homes within a second, and a slow
one, so that homes are lost slowly. Both are lower bounds: a few requests say little about a rate, and one router of
several sees only its share of the requests.
"""

import math
from dataclasses import dataclass

_FAST_S = 1.0
_SLOW_S = 30.0
_SHRINK_INTERVAL_S = 5.0
_ACTIVE_S = 120.0
_FREQUENT_REQUESTS = 1.2
_SHRINK_MARGIN = 0.25  # in homes; keeps the number from flipping at a border


@dataclass(slots=True)
class Demand:
    """Traffic of one adapter through one router. Work is in prefill-equivalent tokens."""

    homes: int = 1
    _last_s: float = -math.inf
    _shrunk_s: float = -math.inf
    _fast: float = 0.0  # requests, decaying with _FAST_S
    _slow: float = 0.0  # requests, decaying with _SLOW_S
    _mean_work: float = 0.0  # of a request

    def add_request(self, work: float, now_s: float) -> None:
        fast, slow = self._decay(now_s)
        self._fast, self._slow = self._fast * fast + 1, self._slow * slow + 1
        self._mean_work += (work - self._mean_work) / self._slow
        self._last_s = now_s

    def _decay(self, now_s: float) -> tuple[float, float]:
        idle_s = now_s - self._last_s
        if idle_s <= 0.0:
            return 1.0, 1.0
        return math.exp(-idle_s / _FAST_S), math.exp(-idle_s / _SLOW_S)

    def work_per_s(self, now_s: float) -> float:
        """Return the greater of two lower bounds: n requests count as n - 2 sqrt(n) (fast) or n - sqrt(n) (slow)."""
        fast, slow = self._decay(now_s)
        few, many = self._fast * fast, self._slow * slow
        return self._mean_work * max((few - 2 * math.sqrt(few)) / _FAST_S, (many - math.sqrt(many)) / _SLOW_S, 0.0)

    def is_active(self, now_s: float) -> bool:
        return now_s - self._last_s < _ACTIVE_S

    @property
    def is_frequent(self) -> bool:
        """Whether several requests came recently, so that the next one is likely within seconds."""
        return self._fast > _FREQUENT_REQUESTS

    def update_homes(self, needed: float, limit: int, now_s: float, *, shrink_at_once: bool = False) -> int:
        """Set and return the number of homes for traffic that needs `needed` (a fraction) of them, up to `limit`.

        The number grows at once and shrinks by small steps, or at once with `shrink_at_once`.
        """
        target = min(max(math.ceil(needed), 1), max(limit, 1))
        if target >= self.homes or self.homes > limit or shrink_at_once:
            self.homes, self._shrunk_s = target, now_s
        elif needed < self.homes - 1 - _SHRINK_MARGIN and now_s - self._shrunk_s > _SHRINK_INTERVAL_S:
            self.homes, self._shrunk_s = self.homes - max(1, (self.homes - target) // 8), now_s
        return self.homes
