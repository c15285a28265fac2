"""What replicas have told of their texts, by index, and how much of it still counts."""

import math

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.report import QueueLoad

_LIFETIME_S = 1.0  # after about this time, none of the texts runs that a report has told of

Vector = NDArray[np.float64]


class TextLoads:
    """The texts of all replicas.

    Attributes:
        free_tokens, freed_per_s: float64 [replicas], see `QueueLoad`.
        work: of the tokens of one text: the mean of the replicas that have reported texts. A replica with few texts
            measures more work for each. With its own number, it would seem as busy as one with many texts.
        running_s: float64 [replicas], time that the running texts take. With the age of a report, it approaches the
            mean of all replicas: by late reports, all routers would send their texts to the same replica.
        least_free_tokens: no more than the least of `free_tokens`.
        known: whether any replica has told of texts.
    """

    def __init__(self, replicas: int) -> None:
        self.running_s, self.freed_per_s, self._told_s, self._work = np.zeros((4, replicas))
        self.free_tokens: Vector = np.full(replicas, np.inf)
        self.least_free_tokens = math.inf
        self.known = False
        self.work = self._mean_s = 0.0

    def keep(self, before: "TextLoads", new: NDArray[np.intp], old: NDArray[np.intp]) -> None:
        """Take over the replicas `old` of another membership, whose indices are now `new`."""
        self.known, self.least_free_tokens, self.work = before.known, before.least_free_tokens, before.work
        for name in ("running_s", "freed_per_s", "_told_s", "_work", "free_tokens"):
            getattr(self, name)[new] = getattr(before, name)[old]
        self._mean_s = float(self._told_s.mean())

    def update(self, i: int, load: QueueLoad, work_per_s: float, age_s: float) -> None:
        """Store what replica `i` has told, if it has had texts."""
        if load.text_work:
            self.known, self.work = True, self.work or load.text_work
            self._work[i], self.free_tokens[i], self.freed_per_s[i] = load.text_work, load.free_tokens, load.freed_per_s
            self.least_free_tokens = min(self.least_free_tokens, load.free_tokens)
            self._told_s[i] = load.texts * self.work / work_per_s
            self._fade(i, age_s)

    def refresh(self, age_s: Vector) -> None:
        """Update what changes with time alone, a few times a second.

        Args:
            age_s: float64 [replicas], of the reports.
        """
        if self.known:
            self._mean_s = float(self._told_s.mean())
            self.work = float(self._work.sum() / max(np.count_nonzero(self._work), 1))
            self._fade(slice(None), age_s)
            self.least_free_tokens = float(self.free_tokens.min())

    def _fade(self, which: int | slice, age_s: float | Vector) -> None:
        left = np.maximum(1.0 - age_s / _LIFETIME_S, 0.0)
        self.running_s[which] = self._mean_s + (self._told_s[which] - self._mean_s) * left
