"""What a replica says of itself: its load with every answer, what it holds at every change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

BEAT_S = 1.0  # between two reports of a replica at most, while there are few gateways
_PACE_S = 0.05  # and at least
_PACE_EACH_S = 0.005  # a gateway: with many of them, reports are further apart
_LEVEL_S = 0.05


def pace_s(gateways: int) -> float:
    """Seconds between two reports of a replica at least."""
    return max(_PACE_S, _PACE_EACH_S * gateways)


def level(wait_s: float) -> int:
    """A wait, coarsely: told apart by powers of two from 50 ms on. Changes of it are worth a report."""
    return math.ceil(math.log2(wait_s / _LEVEL_S)) if wait_s > _LEVEL_S else 0


@dataclass(frozen=True)
class QueueLoad:
    """A replica's queue at one moment.

    `number` grows with each load a replica tells: an older one that comes late is not believed. `received_tokens` is
    how much of what the reader has sent was in the queue by then, so that what is still on the way can be added.
    """

    number: int
    queued_tokens: int  # waiting and running
    tokens_per_s: float  # while it computes; 0: not measured yet
    done_tokens: int  # since it started
    received_tokens: int
    at_s: float = 0.0  # when, by the wall clock of the replica's machine


@dataclass(frozen=True, slots=True)
class Holdings:
    """Which adapters a replica has where, and what it takes to bring others. Times in seconds, 0: not measured yet."""

    number: int
    resident: frozenset[str]  # ready in the device's slots
    coming: frozenset[str]  # on their way to one
    hosted: frozenset[str]  # in host memory
    slots: int
    taken: int  # slots with an adapter on its way, or one that was used of late
    pool_rank: int  # what every adapter is padded to
    from_disk_s: float = 0.0
    from_host_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StateReport:
    """Both, pushed to every gateway. `received_tokens` by sender stands in for that of `load`."""

    replica: str
    load: QueueLoad
    holdings: Holdings
    gateways: tuple[str, ...]  # that it is told to, in an order that all replicas agree on
    received_tokens: Mapping[str, int] = field(default_factory=dict)
