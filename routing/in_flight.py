"""The requests that a router has sent to replicas and that are not answered yet."""

from collections import OrderedDict
from collections.abc import Collection

_MAX_ENDED_EARLY = 4096


class InFlight:
    """Replica and work of each request in flight, by request id."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[str, float]] = {}
        # A client may disconnect while Ray still looks for a replica. If Ray then sends the request, no answer would
        # remove it.
        self._ended_early: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, request: int) -> bool:
        return request in self._requests

    def add(self, request: int, replica: str, work: float) -> bool:
        """Add a request. Returns False, and does nothing, if the request has ended already."""
        if request in self._ended_early:
            return False
        self._requests[request] = (replica, work)
        return True

    def remove(self, request: int) -> tuple[str, float] | None:
        """Remove a request. Returns its replica and work, or None if it was not sent yet."""
        sent = self._requests.pop(request, None)
        if sent is None:
            self._ended_early[request] = None
            if len(self._ended_early) > _MAX_ENDED_EARLY:
                self._ended_early.popitem(last=False)
        return sent

    def replica_of(self, request: int) -> str | None:
        sent = self._requests.get(request)
        return sent and sent[0]

    def retain(self, replicas: Collection[str]) -> None:
        self._requests = {request: sent for request, sent in self._requests.items() if sent[0] in replicas}
