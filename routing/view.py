"""What a router knows of one replica when it decides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as a gateway sees it, which may be a second old.

    `rank` identifies the place, not the process: a replaced replica comes back under the rank of the one that died, so
    that an adapter keeps its home. `in_flight` counts requests sent and not answered.
    """

    id: str
    rank: int
    in_flight: int = 0
    resident: frozenset[str] = frozenset()  # adapters ready in its device's slots
