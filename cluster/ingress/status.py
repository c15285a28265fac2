"""Data of the status page: the replicas, the adapters that they hold, and recent errors."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ranklet.routing.view import ReplicaView

_MAX_ERRORS = 30
_MAX_MESSAGE_CHARACTERS = 300
_MAX_ADAPTERS = 200  # rows of the page


@dataclass(frozen=True)
class RefusedRequest:
    """A request that was answered with an error. Contains no text of the client."""

    at_s: float
    status: int
    code: str
    message: str


@dataclass
class RecentRequests:
    """Counts of one gateway's requests, and its latest errors."""

    requests: int = 0
    refused: int = 0
    last: "deque[RefusedRequest]" = field(default_factory=lambda: deque(maxlen=_MAX_ERRORS))

    def on_answer(self, status: int, code: str, message: str) -> None:
        """Count a request, and keep the first line of an error's message."""
        self.requests += 1
        if status >= 400:
            self.refused += 1
            first = message.partition("\n")[0][:_MAX_MESSAGE_CHARACTERS]
            self.last.append(RefusedRequest(time.time(), status, code, first))

    def as_dict(self, in_flight: int) -> dict[str, Any]:
        errors = [asdict(each) for each in self.last]
        return {"requests": self.requests, "refused": self.refused, "in_flight": in_flight, "errors": errors}


def status_of(
    base: str,
    names: Sequence[str],
    replicas: Sequence[ReplicaView],
    gateways: Sequence[Mapping[str, Any]],
    refused: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the data of the page.

    Args:
        names: names of all adapters.
        replicas: the last reports to this gateway's router.
        gateways: `RecentRequests.as_dict` of each gateway.
        refused: see `refused_settings`.
    """
    errors = sorted((each for one in gateways for each in one["errors"]), key=lambda each: -float(each["at_s"]))
    tiers: dict[str, dict[str, str]] = {name: {} for name in names}
    for replica in replicas:
        held = replica.holdings
        if held is None:
            continue
        for tier, adapters in (("host", held.hosted), ("loading", held.loading), ("gpu", held.resident)):
            for name in adapters & tiers.keys():
                tiers[name][replica.id] = tier
    shown = sorted(tiers, key=lambda name: (not tiers[name], name))  # adapters that a replica holds come first
    return {
        "base": base, "at_s": time.time(),
        "requests": sum(one["requests"] for one in gateways), "refused": sum(one["refused"] for one in gateways),
        "in_flight": sum(one["in_flight"] for one in gateways),
        "replicas": [
            {
                "id": each.id, "rank": each.rank, "wait_s": each.wait_s, "queued_tokens": int(each.queued_work),
                "tokens_per_s": each.work_per_s, "silent_s": each.silent_s,
                "resident": len(each.holdings.resident) if each.holdings else 0,
                "slots": each.holdings.slots if each.holdings else 0,
            }
            for each in replicas
        ],
        "adapters": [{"name": name, "tiers": tiers[name]} for name in shown[:_MAX_ADAPTERS]],
        "more": max(len(shown) - _MAX_ADAPTERS, 0), "errors": errors[:_MAX_ERRORS], "refused_settings": refused,
    }  # fmt: skip
