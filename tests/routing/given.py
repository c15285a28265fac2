"""Replicas as tests want them: told at one moment, by one router's fleet."""

from collections.abc import Iterable, Mapping

from ranklet.routing.affinity import Affinity, Policy
from ranklet.routing.fleet import Member
from ranklet.routing.report import Holdings, QueueLoad, StateReport

RATE = 100_000.0
NOW_S = 1000.0


def load(number: int = 1, queued: int = 0, received: int = 0, done: int = 0, rate: float = RATE) -> QueueLoad:
    return QueueLoad(number, queued, rate, done, received)


def holdings(
    resident: Iterable[str] = (), hosted: Iterable[str] = (), *, number: int = 1, slots: int = 8, pool_rank: int = 64
) -> Holdings:
    held = frozenset(resident)
    return Holdings(number, held, frozenset(), frozenset(hosted), slots, len(held), pool_rank)


def told(
    routes: Affinity, index: int, queued: int = 0, resident: Iterable[str] = (), *, number: int = 1,
    gateways: tuple[str, ...] = (), now_s: float = NOW_S, slots: int = 8, pool_rank: int = 64,
) -> None:  # fmt: skip
    """Replica `r{index}` says how it is."""
    held = holdings(resident, number=number, slots=slots, pool_rank=pool_rank)
    routes.told(StateReport(f"r{index}", load(number, queued), held, gateways), "me", now_s)


def routes_of(
    count: int, queued: Mapping[int, int] | None = None, resident: Mapping[int, Iterable[str]] | None = None,
    policy: Policy = Policy(),
) -> Affinity:  # fmt: skip
    """Replicas r0, r1, ... of ranks 0, 1, ..., with these tokens queued and these adapters in slots."""
    routes = Affinity(policy)
    routes.fleet.join([Member(f"r{i}", i) for i in range(count)], NOW_S)
    for i in range(count):
        told(routes, i, (queued or {}).get(i, 0), (resident or {}).get(i, ()))
    return routes
