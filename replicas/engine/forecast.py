"""When the device will be free, told from what batches of like size took. Pure: no clock, no device."""

from collections import deque

_SAME = 1.05  # rates that differ by less are the same
_WORTH = 1.15  # a small batch may be slower by so much, where others would wait for a large one
_OLD = 64  # batches after which what a size took is old news: it may have waited for a compiler, or to be captured


class Forecast:
    """Follows the batches on a device, which runs them one after the other. Times in seconds, of one clock."""

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}  # seconds a token, by the batch's power of two
        self._landed_at: dict[int, int] = {}  # by the same: how many batches had landed with its last one
        self._landed = 0
        self._running: deque[int] = deque()  # tokens of the batches launched and not landed
        self.free_s = 0.0  # when the device should be done with all of them

    def launched(self, tokens: int, now_s: float) -> None:
        """A batch was put behind those that run."""
        self._running.append(tokens)
        self.free_s = max(self.free_s, now_s) + self.expected_s(tokens)

    def landed(self, took_s: float, now_s: float) -> None:
        """The oldest batch is done; it had the device for `took_s`."""
        tokens = self._running.popleft()
        size, rate = tokens.bit_length(), took_s / tokens
        self._rates[size] = rate if self._is_old(size) else 0.5 * (self._rates[size] + rate)
        self._landed += 1
        self._landed_at[size] = self._landed
        self.free_s = now_s + sum(map(self.expected_s, self._running))

    def lost(self) -> None:
        """The oldest batch failed."""
        self._running.popleft()

    def enough(self) -> int | None:
        """Tokens from which larger batches were not faster a token; None where that is not known.

        Two such batches one after the other take no longer than both in one, and the first is done in half the time.
        """
        for size in sorted(self._rates):
            larger = [rate for known, rate in self._rates.items() if known > size]
            if larger and self._rates[size] <= _SAME * min(larger):
                return 1 << (size - 1)
        return None

    def small(self) -> int | None:
        """The smallest batch, in tokens, that is not much slower a token; smaller ones than seen of late are tried."""
        if not self._rates:
            return None
        worth = _WORTH * min(self._rates.values())
        smallest = min(size for size, rate in self._rates.items() if rate <= worth)
        untried = smallest > 1 and self._is_old(smallest - 1)
        return 1 << (smallest - 1 - untried)

    def _is_old(self, size: int) -> bool:
        return size not in self._rates or self._landed - self._landed_at[size] >= _OLD

    def expected_s(self, tokens: int) -> float:
        """How long a batch should take: 0 until one has landed."""
        if not self._rates:
            return 0.0
        size = tokens.bit_length()
        return tokens * self._rates[min(self._rates, key=lambda known: abs(known - size))]
