"""The pages that waiting texts are going to compute, so that texts with a common beginning count it once."""

from collections import Counter
from collections.abc import Callable

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.kv_space import sharable
from ranklet.replicas.engine.sequence import Sequence


class QueuedPages:
    """Estimates what waiting sequences will find in the prefix cache when they start.

    Args:
        cached: returns how many of a sequence's pages are in the cache, given their content hashes.
    """

    def __init__(self, cached: Callable[[list[bytes]], int]) -> None:
        self._cached = cached
        self._coming = Counter[bytes]()  # content hashes of pages that waiting sequences compute

    def expected_tokens(self, sequence: Sequence) -> int:
        """Return how many leading tokens of a sequence are cached, or will be computed by others before it."""
        if sequence.row is not None:
            return 0
        hashes = sharable(sequence)
        found = self._cached(hashes)
        while found < len(hashes) and hashes[found] in self._coming:
            found += 1
        return found * PAGE_TOKENS

    def enter(self, sequence: Sequence) -> None:
        """Set `Sequence.expected_cached`, and let later sequences expect the pages that this one computes."""
        sequence.expected_cached = self.expected_tokens(sequence)
        self._coming.update(_own_pages(sequence))

    def leave(self, sequence: Sequence) -> None:
        """Undo `enter`. The pages that a step computes are in the cache once the step is launched."""
        for each in _own_pages(sequence):
            if self._coming[each] > 1:
                self._coming[each] -= 1
            else:
                del self._coming[each]


def _own_pages(sequence: Sequence) -> list[bytes]:
    first = max(sequence.expected_cached, sequence.computed) // PAGE_TOKENS
    return [] if sequence.hashes is None else sequence.hashes[first:]
