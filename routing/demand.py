"""How many homes an adapter's traffic is worth. Pure: the caller brings the time.

Two averages of its tokens a second: a fast one, so that a flash crowd has its homes within a second, and a slow one, so
that they are lost slowly. Both count what is certain only: a handful of requests says little of a rate, least of all to
one router of many, which sees its share alone.
"""

import math
from dataclasses import dataclass

FAST_S = 1.0
SLOW_S = 30.0
COOL_S = 5.0  # between the losses of two homes


@dataclass(slots=True)
class Demand:
    """The traffic of one adapter as one router sees it."""

    homes: int = 1
    _seen_s: float = -math.inf
    _shrunk_s: float = -math.inf
    _fast: float = 0.0  # requests, decaying with FAST_S
    _slow: float = 0.0  # the same with SLOW_S
    _tokens: float = 0.0  # of a request, on the average

    def count(self, tokens: int, now_s: float) -> None:
        """Enter one request."""
        fast, slow = self._decay(now_s)
        self._fast, self._slow = self._fast * fast + 1, self._slow * slow + 1
        self._tokens += (tokens - self._tokens) / self._slow
        self._seen_s = now_s

    def _decay(self, now_s: float) -> tuple[float, float]:
        idle_s = now_s - self._seen_s
        if idle_s <= 0.0:
            return 1.0, 1.0
        return math.exp(-idle_s / FAST_S), math.exp(-idle_s / SLOW_S)

    def tokens_per_s(self, now_s: float) -> float:
        """The greater of both averages, of what is certain: n requests say at least n - 2 sqrt(n), or n - sqrt(n)."""
        fast, slow = self._decay(now_s)
        few, many = self._fast * fast, self._slow * slow
        return self._tokens * max((few - 2 * math.sqrt(few)) / FAST_S, (many - math.sqrt(many)) / SLOW_S, 0.0)

    def is_active(self, now_s: float) -> bool:
        """Whether it was asked for of late."""
        return now_s - self._seen_s < _ACTIVE_S

    @property
    def is_frequent(self) -> bool:
        """Whether its next request is likely within seconds: more than one came lately."""
        return self._fast > _FREQUENT

    def settle(self, wanted: float, most: int, now_s: float, *, hasty: bool = False) -> int:
        """Homes for traffic worth `wanted` of them (a fraction): grown at once, lost one by one unless `hasty`."""
        target = min(max(math.ceil(wanted), 1), max(most, 1))
        if target >= self.homes or self.homes > most or hasty:
            self.homes, self._shrunk_s = target, now_s
        elif wanted < self.homes - 1 - _MARGIN and now_s - self._shrunk_s > COOL_S:
            self.homes, self._shrunk_s = self.homes - max(1, (self.homes - target) // 8), now_s
        return self.homes


_ACTIVE_S = 120.0
_FREQUENT = 1.2
_MARGIN = 0.25  # of a home: traffic on the border does not make it come and go
