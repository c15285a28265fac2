"""Counts the choices of a gateway's router, for the gateway's metrics."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from ranklet.routing.policy import Choice

SPILLS = ("load", "retry")  # values of `Choice.spill`


@dataclass
class Counters:
    """Choices for requests that name an adapter. Counts only grow; reading needs no lock.

    Attributes:
        hits: the chosen replica had reported that it holds the adapter.
        misses: the chosen replica had not.
        spills: choices of a replica that is not one of the adapter's homes, by reason.
        prefetches: orders to load an adapter ahead of its requests.
    """

    hits: int = 0
    misses: int = 0
    spills: Counter[str] = field(default_factory=Counter)
    prefetches: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, choice: Choice) -> None:
        """Count a choice. Choices for the base model are not counted."""
        if choice.hit is None:
            return
        with self._lock:
            self.hits += choice.hit
            self.misses += not choice.hit
            self.prefetches += len(choice.prefetch)
            if choice.spill:
                self.spills[choice.spill] += 1
