"""What an adapter manager knows of the requests that wait for an adapter."""

from collections.abc import Iterable
from typing import Protocol

from ranklet.replicas.errors import RankletError


class WaitingRequest(Protocol):
    """A request that waits for an adapter."""

    def fail(self, error: RankletError) -> None: ...


def fail_all(requests: Iterable[WaitingRequest], error: RankletError) -> None:
    for request in requests:
        request.fail(error)
