"""How the routers of this process decided, for its metrics. Counts only grow; reading needs no lock."""

from collections import Counter
from dataclasses import dataclass, field

from ranklet.routing.affinity import Choice

SPILLS = ("load", "retry")  # as `Choice.spill` tells them


@dataclass
class Counters:
    """Choices for requests that name an adapter.

    Attributes:
        hits: the replica chosen had said that it holds the adapter.
        misses: it had not.
        spills: choices of a replica that is none of the adapter's homes, by reason.
        prefetches: orders to load an adapter ahead of its requests.
    """

    hits: int = 0
    misses: int = 0
    spills: Counter[str] = field(default_factory=Counter)
    prefetches: int = 0

    def count(self, choice: Choice) -> None:
        """Enter a choice; one for the base model counts for nothing."""
        if choice.hit is None:
            return
        self.hits += choice.hit
        self.misses += not choice.hit
        self.prefetches += len(choice.prefetch)
        if choice.spill:
            self.spills[choice.spill] += 1


_CURRENT = Counters()


def current() -> Counters:
    """This process's. A function, since Ray may ship the router's class by value, with copies of what it names."""
    return _CURRENT
