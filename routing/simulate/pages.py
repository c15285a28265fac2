"""The pages of a simulated key-value cache: shared by content, evicted by last use. As `replicas/cache/pages.py`."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from math import inf


class SimulatedPages:
    """Counts pages. Pages without content, such as those that are being written, are only a number.

    Attributes:
        count: number of pages.
        kept_since_s: pages that were used later than this are cached.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept_since_s = -inf
        self._used: Counter[int] = Counter()  # references
        self._cached: OrderedDict[int, float] = OrderedDict()  # last use; the next to be evicted first
        self._private = 0.0

    @property
    def available(self) -> float:
        return self.count - len(self._used) - self._private

    def match(self, pages: Sequence[int]) -> int:
        """Return how many of the first pages are known."""
        for depth, page in enumerate(pages):
            if page not in self._used and page not in self._cached:
                return depth
        return len(pages)

    def use(self, pages: Sequence[int]) -> None:
        """Add a reference to each page. Unknown ones become known."""
        for page in pages:
            self._cached.pop(page, None)
            self._used[page] += 1

    def release(self, pages: Sequence[int], now_s: float) -> None:
        for page in reversed(pages):
            left = self._used[page] - 1
            if left:
                self._used[page] = left
            else:
                del self._used[page]
                self._cached[page] = now_s

    def grow(self, pages: float) -> None:
        """Take pages without content, or give them back."""
        self._private += pages

    def evict(self) -> bool:
        """Evict cached pages until all pages fit. Returns whether they do."""
        over = len(self._used) + len(self._cached) + self._private - self.count
        while over > 0 and self._cached:
            self.kept_since_s = self._cached.popitem(last=False)[1]
            over -= 1
        return over <= 0
