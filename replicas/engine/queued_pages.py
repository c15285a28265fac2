"""The pages that waiting texts are going to compute, so that a flow's texts with a common beginning count it once.

What another flow is going to compute is not expected: its texts may come far later, and then this flow computes it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Many

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.kv_space import sharable
from ranklet.replicas.engine.sequence import Flow, Sequence


class QueuedPages:
    """Estimates what waiting sequences will find in the prefix cache when they start.

    Args:
        cached: returns how many of a sequence's pages are in the cache, given their content hashes.
    """

    def __init__(self, cached: Callable[[list[bytes]], int]) -> None:
        self._cached = cached
        # Content hashes of the pages that each flow's waiting sequences compute.
        self._coming: defaultdict[Flow, Counter[bytes]] = defaultdict(Counter)

    def expected_tokens(self, sequence: Sequence) -> int:
        """Return how many leading tokens of a sequence are cached, or will be computed by its flow before it."""
        if sequence.row is not None:
            return 0
        hashes = sharable(sequence)
        found, coming = self._cached(hashes), self._coming.get(sequence.flow, ())
        while found < len(hashes) and hashes[found] in coming:
            found += 1
        return found * PAGE_TOKENS

    def work_of(self, sequences: Many[Sequence]) -> int:
        """Return the work of sequences once they wait."""
        for each in sequences:
            self.enter(each)
        for each in sequences:
            self.leave(each)
        return sum(each.work for each in sequences)

    def enter(self, sequence: Sequence) -> None:
        """Set `Sequence.expected_cached`, and let later sequences expect the pages that this one computes."""
        sequence.expected_cached = self.expected_tokens(sequence)
        if own := _own_pages(sequence):
            self._coming[sequence.flow].update(own)

    def leave(self, sequence: Sequence) -> None:
        """Undo `enter`. The pages that a step computes are in the cache once the step is launched."""
        coming = self._coming[sequence.flow]
        for each in _own_pages(sequence):
            if coming[each] > 1:
                coming[each] -= 1
            else:
                del coming[each]
        if not coming:
            del self._coming[sequence.flow]


def _own_pages(sequence: Sequence) -> list[bytes]:
    first = max(sequence.expected_cached, sequence.computed) // PAGE_TOKENS
    return [] if sequence.hashes is None else sequence.hashes[first:]
