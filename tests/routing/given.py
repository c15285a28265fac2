"""Routers with replicas in a given state and a clock that only the test moves."""

from collections.abc import Iterable, Mapping

from ranklet.routing.affinity import Affinity
from ranklet.routing.fleet import Fleet, Member
from ranklet.routing.policy import Policy
from ranklet.routing.report import Holdings, QueueLoad, StateReport

RATE = 100_000.0
GATEWAY = "me"


class ManualClock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class ManualAffinity(Affinity):
    """An `Affinity` whose clock and fleet the test can reach."""

    def __init__(self, policy: Policy = Policy()) -> None:
        self.clock, self.fleet = ManualClock(), Fleet()
        super().__init__(policy, self.fleet, clock=self.clock)

    def waits(self) -> list[float]:
        return [float(wait_s) for wait_s in self.fleet.waits(self.clock())]


def load(number: int = 1, queued: float = 0, received: float = 0, done: float = 0, rate: float = RATE) -> QueueLoad:
    return QueueLoad(number, queued, rate, done, received)


def holdings(
    resident: Iterable[str] = (), hosted: Iterable[str] = (), *, number: int = 1, slots: int = 8, pool_rank: int = 64
) -> Holdings:
    held = frozenset(resident)
    return Holdings(number, held, frozenset(), frozenset(hosted), slots, len(held), pool_rank)


def report(
    affinity: Affinity, index: int, queued: float = 0, resident: Iterable[str] = (), *, number: int = 1,
    gateways: tuple[str, ...] = (), slots: int = 8, pool_rank: int = 64,
) -> None:  # fmt: skip
    """Send a report of replica `r{index}` to the router."""
    held = holdings(resident, number=number, slots=slots, pool_rank=pool_rank)
    affinity.on_report(StateReport(f"r{index}", load(number, queued), held, gateways), GATEWAY)


def affinity_with(
    count: int, queued: Mapping[int, float] | None = None, resident: Mapping[int, Iterable[str]] | None = None,
    policy: Policy = Policy(),
) -> ManualAffinity:  # fmt: skip
    """Return a router with replicas r0, r1, ... of ranks 0, 1, ..., with these queues and adapters in slots."""
    affinity = ManualAffinity(policy)
    affinity.set_members([Member(f"r{i}", i) for i in range(count)])
    for i in range(count):
        report(affinity, i, (queued or {}).get(i, 0), (resident or {}).get(i, ()))
    return affinity
