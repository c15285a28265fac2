"""The routing hint that a gateway adds to a call for its router, and the prefetch orders that the router returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

HINT = "hint"  # keyword argument of a call that carries the hint


@dataclass(frozen=True, slots=True)
class TextHint:
    """What a router needs to know of a call that makes texts.

    Attributes:
        pages: hashes of the full pages of its first prompt, see `prefix.page_hashes`.
        texts: number of texts.
        room: tokens of the key-value cache that the call may need.
    """

    pages: Sequence[int] = ()
    texts: int = 1
    room: int = 0


@dataclass(frozen=True)
class RoutingHint:
    """One attempt at a call. Only the router in the gateway's own process reads it.

    Attributes:
        id: unique in this process.
        adapter: name of the adapter, None for the base model.
        work: tokens of the prompts. 0 for calls without prompts, such as a load.
        avoid: id of the replica that has just failed the call.
        only: id of the replica that the call is for. If that replica is gone, any other may serve the call.
        location: location of the adapter. The router returns it in its prefetch orders and does not read it.
        text: None if the call makes no text.
    """

    id: int
    adapter: str | None = None
    work: float = 0
    avoid: str | None = None
    only: str | None = None
    location: object = None
    text: TextHint | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Send only the id to the replica, which does not read the rest."""
        return RoutingHint, (self.id,)


class PrefetchOrder(NamedTuple):
    """A load that a replica should start ahead of requests.

    Attributes:
        replica: id of the replica.
        adapter: name of the adapter.
        location: `RoutingHint.location` of the request that led to the order.
    """

    replica: str
    adapter: str
    location: object
