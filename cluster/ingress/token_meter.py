"""Records and charges the generated tokens of one request as they arrive."""

import time

from ranklet.cluster.access.quota import Charge
from ranklet.cluster.ingress.observe import Observer, RequestRecord


class TokenMeter:
    """Counts tokens for the request's record, its quota, and the metrics of streams.

    Args:
        streams: whether the client sees each token as it arrives.
    """

    def __init__(self, observer: Observer, record: RequestRecord, charge: Charge, *, streams: bool) -> None:
        self._observer = observer
        self._record = record
        self._charge = charge
        self._streams = streams
        self._last_s: dict[int, float] = {}  # by choice

    def add(self, index: int, tokens: int) -> None:
        """Count tokens of choice `index` that have arrived together."""
        is_first = self._record.on_tokens(tokens)
        self._charge.add(tokens)
        if not self._streams or not tokens:
            return
        now_s = time.perf_counter()
        last_s = self._last_s.get(index)
        self._last_s[index] = now_s
        if is_first:
            self._observer.on_first_token(self._record)
        if last_s is not None:
            self._observer.on_gap(tokens, now_s - last_s)
