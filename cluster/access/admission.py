"""Limits on the requests that one gateway works on, in total and of one key for one model."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from ranklet.replicas.engine.fair_share import fair_share
from ranklet.replicas.errors import Saturated


class Admission:
    """Counts the requests of one gateway.

    Args:
        limit: limits.max_in_flight_requests.
        on_change: called with the number of requests in flight.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None] = lambda in_flight: None) -> None:
        self._limit = limit
        self._on_change = on_change
        self._by_flow: Counter[tuple[str, str]] = Counter()  # model and name of the key
        self.in_flight = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request while the context lasts.

        Raises:
            Saturated: the limit is reached.
        """
        if self.in_flight >= self._limit:
            raise Saturated(
                f"expected fewer than {self._limit} requests in this gateway (limits.max_in_flight_requests). Try again"
            )
        self.in_flight += 1
        self._on_change(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._on_change(self.in_flight)

    @contextlib.contextmanager
    def admit_model(self, model: str, key_name: str = "") -> Iterator[None]:
        """Count an admitted request for its model and key while the context lasts.

        Args:
            key_name: name of the API key; "" without keys.

        Raises:
            Saturated: the key already has its fair share of the limit with this model.
        """
        flow = model, key_name
        own = self._by_flow[flow]
        share = fair_share(self._limit, self.in_flight - own - 1)
        if own and own >= share:
            by_key = f" with key {key_name!r}" if key_name else ""
            raise Saturated(
                f"expected fewer than {share} requests for {model!r}{by_key} in this gateway, so that others get "
                f"their share (limits.max_in_flight_requests: {self._limit}). Try again"
            )
        self._by_flow[flow] += 1
        try:
            yield
        finally:
            self._by_flow[flow] -= 1
            if not self._by_flow[flow]:
                del self._by_flow[flow]
