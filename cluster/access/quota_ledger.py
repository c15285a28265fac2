"""What is left of each quota, over all gateways. The ledger grants tokens to gateways, which spend them on requests."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

IDLE_S = 120.0  # longer than an empty bucket takes to refill, so an idle bucket can be dropped
_EXPECTED_SHARE = 4  # a gateway gets at most this part of what is left for requests that have not come yet


@dataclass(frozen=True)
class QuotaOwner:
    """The owner of a quota: `by` is "key" or "adapter", `name` is the name of the key or the model."""

    by: str
    name: str


@dataclass
class TokenBucket:
    """Token bucket with one minute of burst. It may be overdrawn."""

    per_minute: int
    level: float
    at_s: float

    def level_at(self, now_s: float) -> float:
        """Return the tokens in the bucket. If the clock has gone back, no tokens are added."""
        return min(self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60)

    def withdraw(self, tokens: float, now_s: float) -> float:
        """Remove tokens, or add them if negative. Returns the new level."""
        self.level, self.at_s = min(self.per_minute, self.level_at(now_s) - tokens), now_s
        return self.level


@dataclass(frozen=True)
class Statement:
    """What a gateway says about one quota.

    Attributes:
        returned: granted tokens that it does not need; negative if it has spent more than it was granted.
        needed: tokens that its waiting requests need.
        spent: tokens since its last turn. It may need as many until the next one.
        level: what the ledger has left, by the gateway's own count.
    """

    per_minute: int
    returned: float
    needed: float
    spent: float
    level: float


@dataclass(frozen=True)
class Grant:
    """Tokens that a gateway may spend, and the level that the ledger has left."""

    tokens: float
    level: float


class Ledger:
    """The buckets of all quotas of an application. A missing bucket starts at the level that a gateway states."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[QuotaOwner, TokenBucket] = {}

    def settle(self, statements: Mapping[QuotaOwner, Statement]) -> dict[QuotaOwner, Grant]:
        """Take back the tokens that a gateway returns, and grant it others, as far as there are any."""
        now_s = self._clock()
        self._buckets = {owner: bucket for owner, bucket in self._buckets.items() if now_s - bucket.at_s < IDLE_S}
        grants = {}
        for owner, said in statements.items():
            bucket = self._buckets.setdefault(owner, TokenBucket(said.per_minute, said.level, now_s))
            bucket.per_minute = said.per_minute
            level = bucket.withdraw(-said.returned, now_s)
            tokens = max(0.0, min(level, said.needed))
            tokens += max(0.0, min(said.spent, (level - tokens) / _EXPECTED_SHARE))
            grants[owner] = Grant(tokens, bucket.withdraw(tokens, now_s))
        return grants
