"""The requests that a router has sent to replicas and that are not answered yet."""

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

_MAX_ENDED_EARLY = 4096


class Sent(NamedTuple):
    """A request in flight.

    Attributes:
        work: that its replica must still do for it, as far as it delays others.
        told: its work as the call tells it to the replica, which does not know what the router expects.
    """

    replica: str
    work: float
    told: float


class InFlight:
    """The requests in flight, by request id."""

    def __init__(self) -> None:
        self._requests: dict[int, Sent] = {}
        # A client may disconnect while Ray still looks for a replica. If Ray then sends the request, no answer would
        # remove it.
        self._ended_early: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, request: int) -> bool:
        return request in self._requests

    def get(self, request: int) -> Sent | None:
        return self._requests.get(request)

    def add(self, request: int, sent: Sent) -> bool:
        """Add or change a request. Returns False, and does nothing, if the request has ended already."""
        if request in self._ended_early:
            return False
        self._requests[request] = sent
        return True

    def remove(self, request: int) -> Sent | None:
        """Remove and return a request; None if it was not sent yet."""
        sent = self._requests.pop(request, None)
        if sent is None:
            self._ended_early[request] = None
            if len(self._ended_early) > _MAX_ENDED_EARLY:
                self._ended_early.popitem(last=False)
        return sent

    def replica_of(self, request: int) -> str | None:
        sent = self._requests.get(request)
        return sent and sent.replica

    def retain(self, replicas: Collection[str]) -> None:
        self._requests = {request: sent for request, sent in self._requests.items() if sent.replica in replicas}
