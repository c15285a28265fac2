"""A replica as one router sees it, for the status page."""

from dataclasses import dataclass

from ranklet.routing.report import Holdings


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as a router sees it. Work is in prefill-equivalent tokens."""

    id: str
    rank: int
    wait_s: float
    queued_work: float
    work_per_s: float
    silent_s: float  # since its last sign of life
    holdings: Holdings | None
