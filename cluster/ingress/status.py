"""What the status page shows: replicas, where adapters are, and what was refused of late."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ranklet.routing.fleet import ReplicaView

PAGE = Path(__file__).with_name("status.html")
_KEPT = 30  # refusals
_MOST_CHARACTERS = 300
_MOST_ADAPTERS = 200  # rows of the page


@dataclass(frozen=True)
class RefusedRequest:
    """One request that was not answered with vectors; never its texts."""

    at_s: float
    status: int
    code: str
    message: str


@dataclass
class RecentRequests:
    """What one gateway remembers of its requests."""

    requests: int = 0
    refused: int = 0
    last: "deque[RefusedRequest]" = field(default_factory=lambda: deque(maxlen=_KEPT))

    def answered(self, status: int, code: str, message: str) -> None:
        """Count a request; `message` of a refusal, whose first line is kept."""
        self.requests += 1
        if status >= 400:
            self.refused += 1
            first = message.partition("\n")[0][:_MOST_CHARACTERS]
            self.last.append(RefusedRequest(time.time(), status, code, first))

    def told(self, in_flight: int) -> dict[str, Any]:
        """For the gateway that was asked for the page."""
        last = [asdict(each) for each in self.last]
        return {"requests": self.requests, "refused": self.refused, "in_flight": in_flight, "errors": last}


def status(
    base: str, names: Sequence[str], seen: Sequence[ReplicaView], gateways: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The page's data: what this gateway's router has heard of the replicas, and what all gateways remember."""
    errors = sorted((each for told in gateways for each in told["errors"]), key=lambda each: -float(each["at_s"]))
    tiers: dict[str, dict[str, str]] = {name: {} for name in names}
    for replica in seen:
        held = replica.holdings
        if held is None:
            continue
        for tier, there in (("host", held.hosted), ("loading", held.loading), ("gpu", held.resident)):
            for name in there & tiers.keys():
                tiers[name][replica.id] = tier
    shown = sorted(tiers, key=lambda name: (not tiers[name], name))  # what is held somewhere first
    return {
        "base": base, "at_s": time.time(),
        "requests": sum(told["requests"] for told in gateways), "refused": sum(told["refused"] for told in gateways),
        "in_flight": sum(told["in_flight"] for told in gateways),
        "replicas": [
            {
                "id": each.id, "rank": each.rank, "wait_s": each.wait_s, "queued_tokens": int(each.queued_work),
                "tokens_per_s": each.work_per_s, "silent_s": each.silent_s,
                "resident": len(each.holdings.resident) if each.holdings else 0,
                "slots": each.holdings.slots if each.holdings else 0,
            }
            for each in seen
        ],
        "adapters": [{"name": name, "tiers": tiers[name]} for name in shown[:_MOST_ADAPTERS]],
        "more": max(len(shown) - _MOST_ADAPTERS, 0), "errors": errors[:_KEPT],
    }  # fmt: skip
