"""Forecast of when the device is free, from the durations of steps of similar size. No clock, no device."""

from collections import deque

_EQUAL = 1.05  # rates within this factor count as equal
_ACCEPTABLE = 1.15  # how much slower per token a small step may be where others would wait for a large one
_OLD_STEPS = 64  # a size's rate is outdated after this many steps: it may include a compilation or a graph capture
_RETRY_LARGER = 8  # times as many steps later a larger size is tried again, which delays others
_GROWTH = 4  # how much larger than the largest known step the next one may be


class Forecast:
    """Records the durations of a device's steps, which run one after the other. All times are of one clock.

    Attributes:
        free_s: when the device should be done with all launched steps.
    """

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}  # seconds per token, by the bit length of the step's tokens
        self._measured_at: dict[int, int] = {}  # number of finished steps at each rate's last measurement
        self._finished = 0
        self._running: deque[int | None] = deque()  # tokens of launched steps, oldest first
        self.free_s = 0.0

    def on_launch(self, tokens: int | None, now_s: float) -> None:
        """Record a launch. `tokens` is None for a step whose time does not depend on its tokens alone."""
        self._running.append(tokens)
        self.free_s = max(self.free_s, now_s) + self.expected_s(tokens)

    def on_finish(self, device_s: float, now_s: float) -> None:
        """Record that the oldest step is done; it had the device for `device_s`."""
        tokens = self._running.popleft()
        if tokens is None:
            self.free_s = now_s + sum(map(self.expected_s, self._running))
            return
        size, rate = tokens.bit_length(), device_s / tokens
        self._rates[size] = rate if self._is_outdated(size) else 0.5 * (self._rates[size] + rate)
        self._finished += 1
        self._measured_at[size] = self._finished
        self.free_s = now_s + sum(map(self.expected_s, self._running))

    def on_failure(self) -> None:  # of the oldest step
        self._running.popleft()

    def enough_tokens(self) -> int | None:
        """Return the size above which steps are not faster per token; None if it is not known.

        Two steps of that size take no longer than one of twice the size, and the first ends in half the time.
        """
        for size in sorted(self._rates):
            larger = [rate for known, rate in self._rates.items() if known > size]
            if larger and self._rates[size] <= _EQUAL * min(larger):
                return 1 << (size - 1)
        return None

    def small_tokens(self, most: int = 0) -> int | None:
        """Return the smallest step size that is not much slower per token; None before a step has finished.

        Returns the next smaller size instead if that was not measured recently. The next larger one is tried less
        often, and only up to `most` tokens: others wait for it.
        """
        if not self._rates:
            return None
        acceptable = _ACCEPTABLE * min(self._rates.values())
        smallest = min(size for size, rate in self._rates.items() if rate <= acceptable)
        if 1 << smallest <= most and self._is_outdated(smallest + 1, _OLD_STEPS * _RETRY_LARGER):
            return 1 << smallest
        untried = smallest > 1 and self._is_outdated(smallest - 1)
        return 1 << (smallest - 1 - untried)

    def brief_tokens(self, limit_s: float) -> int | None:
        """Return the size of a step that takes about `limit_s`; None before a step has finished.

        The rate of a small step says little about a large one. Therefore it is at most a few times the largest size
        that is known.
        """
        known = 0
        for size, rate in sorted(self._rates.items()):
            if rate * (1 << size) > limit_s:
                brief = max(1, int(limit_s / rate))
                return max(brief, 1 << min(known, size - 1)) if self._is_outdated(size) else brief
            known = size
        return _GROWTH << known if known else None

    def _is_outdated(self, size: int, steps: int = _OLD_STEPS) -> bool:
        return size not in self._rates or self._finished - self._measured_at[size] >= steps

    def expected_s(self, tokens: int | None) -> float:
        """Return how long a step should take; 0 if it is not known."""
        if not self._rates or tokens is None:
            return 0.0
        size = tokens.bit_length()
        return tokens * self._rates[min(self._rates, key=lambda known: abs(known - size))]
