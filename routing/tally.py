"""How the routers of this process decided, for its metrics. Counts only grow; reading needs no lock."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ranklet.routing import affinity
from ranklet.routing.view import ReplicaView


@dataclass
class Tally:
    """Choices for requests that name an adapter.

    Attributes:
        hits: the replica chosen had said that it holds the adapter.
        misses: it had not.
        spills: choices of another replica than the adapter's home, by reason: "load" (the home carries too much),
            "resident" (another holds the adapter, the home does not), "retry" (the home has just failed the request).
    """

    hits: int = 0
    misses: int = 0
    spills: Counter[str] = field(default_factory=Counter)

    def count(self, views: Sequence[ReplicaView], chosen: int, adapter: str, policy: affinity.Policy) -> None:
        """Enter the choice of `views[chosen]`."""
        if adapter in views[chosen].resident:
            self.hits += 1
        else:
            self.misses += 1
        home = affinity.rendezvous(adapter, tuple([view.rank for view in views]))[0]
        if chosen != home:
            self.spills[self._reason(views, home, adapter, policy)] += 1

    @staticmethod
    def _reason(views: Sequence[ReplicaView], home: int, adapter: str, policy: affinity.Policy) -> str:
        if views[home].in_flight >= policy.bound(sum(view.in_flight for view in views), len(views)):
            return "load"
        return "resident" if adapter not in views[home].resident else "retry"


_CURRENT = Tally()


def current() -> Tally:
    """This process's. A function, since Ray may ship the router's class by value, with copies of what it names."""
    return _CURRENT
