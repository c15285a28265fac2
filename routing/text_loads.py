"""What replicas have told of their texts, by index, and how much of it still counts."""

import math

import numpy as np
from numpy.typing import NDArray

from ranklet.routing.report import QueueLoad

_LIFETIME_S = 1.0  # after about this time, none of the texts runs that a report has told of
_LEAST_FREED_PER_S = 1000.0
_LEAST_ENDED_PER_S = 1.0
_LONGEST_ROOM_WAIT_S = 10.0

# Arrays with one value per replica, kept for replicas that stay when the membership changes.
_PER_REPLICA = (
    "running_s", "_told_s", "_work", "_told_share", "_free_tokens", "_freed_per_s", "_free_texts", "_ended_per_s",
)  # fmt: skip

Vector = NDArray[np.float64]


class TextLoads:
    """The texts of all replicas.

    Attributes:
        least_free_tokens, least_free_texts: no replica has reported fewer free tokens or texts; see `QueueLoad`.
        work: of the tokens of one text: the mean of the replicas that have reported texts. A replica with few texts
            measures more work for each. With its own number, it would seem as busy as one with many texts.
        running_s: float64 [replicas], time that the running texts take. With the age of a report, it approaches the
            mean of all replicas: by late reports, all routers would send their texts to the same replica.
        known: whether any replica has told of texts.
    """

    def __init__(self, replicas: int) -> None:
        self.running_s, self._told_s, self._work, self._freed_per_s, self._ended_per_s = np.zeros((5, replicas))
        self._told_share = np.zeros(replicas)  # weight of a replica's own report; the mean of all has the rest
        self._free_tokens, self._free_texts = np.full((2, replicas), np.inf)
        self.least_free_tokens = self.least_free_texts = math.inf
        self.known = False
        self.work = self._mean_s = 0.0

    def keep(self, before: "TextLoads", new: NDArray[np.intp], old: NDArray[np.intp]) -> None:
        """Take over the replicas `old` of another membership, whose indices are now `new`."""
        self.known, self.work = before.known, before.work
        self.least_free_tokens, self.least_free_texts = before.least_free_tokens, before.least_free_texts
        for name in _PER_REPLICA:
            getattr(self, name)[new] = getattr(before, name)[old]
        self._mean_s = float(self._told_s.mean())

    def update(self, i: int, load: QueueLoad, work_per_s: float, age_s: float) -> None:
        """Store what replica `i` has told, if it has had texts."""
        if load.text_work:
            self.known, self.work = True, self.work or load.text_work
            self._work[i] = load.text_work
            self._free_tokens[i], self._freed_per_s[i] = load.free_tokens, load.freed_per_s
            self._free_texts[i], self._ended_per_s[i] = load.free_texts, load.ended_per_s
            self.least_free_tokens = min(self.least_free_tokens, load.free_tokens)
            self.least_free_texts = min(self.least_free_texts, load.free_texts)
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
            self.least_free_tokens = float(self._free_tokens.min())
            self.least_free_texts = float(self._free_texts.min())

    def add(self, i: int, texts: int) -> None:
        """Subtract texts that this router sends to replica `i` from its `free_texts`, until its next report."""
        self._free_texts[i] -= texts
        self.least_free_texts = min(self.least_free_texts, float(self._free_texts[i]))

    def places_s(self, texts: int) -> Vector:
        """Return how long texts wait until they may run beside those that do: float64 [replicas]."""
        missing = np.maximum(texts - self._free_texts, 0.0)
        return self._faded(missing / np.maximum(self._ended_per_s, _LEAST_ENDED_PER_S))

    def room_s(self, tokens: Vector) -> Vector:
        """Return how long tokens wait for room in the key-value cache: float64 [replicas]."""
        missing = np.maximum(tokens - self._free_tokens, 0.0)
        return self._faded(missing / np.maximum(self._freed_per_s, _LEAST_FREED_PER_S))

    def _fade(self, which: int | slice, age_s: float | Vector) -> None:
        self._told_share[which] = share = np.maximum(1.0 - age_s / _LIFETIME_S, 0.0)
        self.running_s[which] = _weighted_mean(self._told_s[which], self._mean_s, share)

    def _faded(self, wait_s: Vector) -> Vector:
        wait_s = np.minimum(wait_s, _LONGEST_ROOM_WAIT_S)
        return _weighted_mean(wait_s, float(wait_s.mean()), self._told_share)


def _weighted_mean(own: Vector, mean: float, weight: float | Vector) -> Vector:
    """Return the weighted mean of a replica's own value and the mean of all."""
    result: Vector = mean + (own - mean) * weight
    return result
