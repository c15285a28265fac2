"""How many requests one gateway has, and how many of them may be for one adapter."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from ranklet.replicas.engine.fair_share import share_of_room
from ranklet.replicas.errors import Saturated


class Admission:
    """Requests in one gateway.

    Args:
        limit: of requests, limits.max_in_flight_requests.
        changed: is told their number.
    """

    def __init__(self, limit: int, changed: Callable[[int], None] = lambda number: None) -> None:
        self._limit = limit
        self._changed = changed
        self._by_model: Counter[str] = Counter()
        self.in_flight = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """One more, while this is entered. Raises Saturated when there is no room."""
        if self.in_flight >= self._limit:
            raise Saturated(
                f"expected fewer than {self._limit} requests in this gateway (limits.max_in_flight_requests). Try again"
            )
        self.in_flight += 1
        self._changed(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._changed(self.in_flight)

    @contextlib.contextmanager
    def admit_model(self, model: str) -> Iterator[None]:
        """It is known what that request is for. Raises Saturated when this model has its share of the room already."""
        own = self._by_model[model]
        share = share_of_room(self._limit, self.in_flight - own - 1)
        if own and own >= share:
            raise Saturated(
                f"expected fewer than {share} requests for {model!r} in this gateway, so that others have room "
                f"(limits.max_in_flight_requests: {self._limit}). Try again"
            )
        self._by_model[model] += 1
        try:
            yield
        finally:
            self._by_model[model] -= 1
            if not self._by_model[model]:
                del self._by_model[model]
