"""Tokens a minute, for a key or an adapter: buckets that all gateways share.

Each gateway decides by itself, at once, by what it was last told and what it has spent since; every fifth of a second
it settles with one ledger. So a quota is exceeded by at most what all gateways let through in that time.
"""

import asyncio
import contextlib
import fnmatch
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ranklet.cluster.access.keys import ApiKey
from ranklet.replicas.errors import RankletError

SYNC_INTERVAL_S = 0.2
_IDLE_S = 120.0  # what nobody has used for so long is full again, and forgotten

logger = logging.getLogger("ray.serve")


class OverQuota(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The key or the adapter has used its tokens of this minute."""

    code, status = "rate_limit_exceeded", 429


@dataclass(frozen=True)
class QuotaFlow:
    """Whose tokens are counted: by "key" or by "adapter", and its name."""

    by: str
    name: str


@dataclass
class TokenBucket:
    """Holds at most a minute's tokens and fills up at that rate. A large request may leave it in debt."""

    per_minute: int
    level: float
    at_s: float

    def level_at(self, now_s: float) -> float:
        """Tokens in it. A clock that goes back adds nothing."""
        return min(self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60)

    def take(self, tokens: float, now_s: float) -> float:
        """Take tokens out, or put them back; returns what is left."""
        self.level, self.at_s = self.level_at(now_s) - tokens, now_s
        return self.level


@dataclass(frozen=True)
class Account:
    """What a gateway says of one flow: its quota, what it has spent, and the level it believes in without that."""

    per_minute: int
    spent: float
    believed: float


class Ledger:
    """The buckets of an application, in a Ray actor of their own; a new one begins with what gateways believe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[QuotaFlow, TokenBucket] = {}

    def sync(self, accounts: Mapping[QuotaFlow, Account]) -> dict[QuotaFlow, float]:
        """Take what a gateway has spent; returns the levels."""
        now_s = self._clock()
        self._buckets = {flow: bucket for flow, bucket in self._buckets.items() if now_s - bucket.at_s < _IDLE_S}
        levels = {}
        for flow, account in accounts.items():
            bucket = self._buckets.setdefault(flow, TokenBucket(account.per_minute, account.believed, now_s))
            bucket.per_minute = account.per_minute
            levels[flow] = bucket.take(account.spent, now_s)
        return levels


class Settles(Protocol):
    """The way to the ledger."""

    def __call__(self, accounts: Mapping[QuotaFlow, Account]) -> Awaitable[Mapping[QuotaFlow, float]]: ...


class Quotas:
    """One gateway's view of all quotas.

    Args:
        settle: the way to the ledger.
        rejected: is told each refusal: by what, and for which model.
    """

    def __init__(
        self, settle: Settles, rejected: Callable[[str, str], None] = lambda by, model: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._settle = settle
        self._rejected = rejected
        self._clock = clock
        self._of_models: dict[str, int] = {}
        self._buckets: dict[QuotaFlow, TokenBucket] = {}
        self._used_s: dict[QuotaFlow, float] = {}
        self._unsettled: dict[QuotaFlow, float] = {}
        self._settling: asyncio.Task[None] | None = None

    def set_model_quotas(self, of_models: Mapping[str, int]) -> None:
        """Tokens a minute for each model whose name a pattern (`legal-*`) matches; the first that does counts."""
        self._of_models = dict(of_models)

    @contextlib.contextmanager
    def charge(self, key: ApiKey | None, model: str, tokens: int) -> Iterator[None]:
        """A request of so many tokens; it costs nothing if it ends with an exception.

        Raises:
            OverQuota: the key's tokens are used up, or the model's.
        """
        flows = dict(self._flows(key, model))
        now_s = self._clock()
        for flow, per_minute in flows.items():
            level = self._level(flow, per_minute, now_s)
            if level <= 0:
                self._rejected(flow.by, model)
                raise OverQuota(_refusal(flow, per_minute), retry_after_s=math.ceil((1 - level) * 60 / per_minute))
        self._spend(flows, tokens, now_s)
        try:
            yield
        except BaseException:
            self._spend(flows, -tokens, self._clock())
            raise

    def _flows(self, key: ApiKey | None, model: str) -> Iterator[tuple[QuotaFlow, int]]:
        if key is not None and key.tokens_per_minute is not None:
            yield QuotaFlow("key", key.name), key.tokens_per_minute
        for pattern, per_minute in self._of_models.items():
            if fnmatch.fnmatchcase(model, pattern):
                yield QuotaFlow("adapter", model), per_minute
                return

    def _level(self, flow: QuotaFlow, per_minute: int, now_s: float) -> float:
        bucket = self._buckets.setdefault(flow, TokenBucket(per_minute, per_minute, now_s))
        bucket.per_minute = per_minute
        return bucket.level_at(now_s)

    def _spend(self, flows: Mapping[QuotaFlow, int], tokens: int, now_s: float) -> None:
        for flow in flows:
            self._buckets[flow].take(tokens, now_s)
            self._unsettled[flow] = self._unsettled.get(flow, 0.0) + tokens
            self._used_s[flow] = now_s
        if flows and (self._settling is None or self._settling.done()):
            self._settling = asyncio.ensure_future(self._settle_on())

    async def _settle_on(self) -> None:
        """Settle until all that was used is full again."""
        while self._used_s:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await self.sync()
            now_s = self._clock()
            for flow in [flow for flow, used_s in self._used_s.items() if now_s - used_s > _IDLE_S]:
                if self._buckets[flow].level_at(now_s) >= self._buckets[flow].per_minute:
                    for known in (self._used_s, self._buckets, self._unsettled):
                        known.pop(flow, None)

    async def sync(self) -> None:
        """Tell the ledger and be told. Without an answer this gateway goes on by its own count."""
        now_s = self._clock()
        sent = {}
        for flow in self._used_s:
            bucket, spent = self._buckets[flow], self._unsettled.pop(flow, 0.0)
            sent[flow] = Account(bucket.per_minute, spent, bucket.level_at(now_s) + spent)
        try:
            levels = await self._settle(sent)
        except TimeoutError as error:
            logger.warning("quotas: the ledger does not answer (%s); counting alone meanwhile", error)
            for flow, account in sent.items():
                self._unsettled[flow] = self._unsettled.get(flow, 0.0) + account.spent
            return
        now_s = self._clock()
        for flow, level in levels.items():  # what was spent while the ledger answered, it does not know
            self._buckets[flow] = TokenBucket(sent[flow].per_minute, level - self._unsettled.get(flow, 0.0), now_s)


def _refusal(flow: QuotaFlow, per_minute: int) -> str:
    whose = f"key {flow.name!r}" if flow.by == "key" else f"adapter {flow.name!r}"
    where = "its entry in the file of keys" if flow.by == "key" else "user_config of the Gateway"
    return f"{whose}: expected at most {per_minute} tokens a minute (tokens_per_minute in {where}). Try again later"
