"""Quotas in tokens a minute, for a key or for a model, shared by all gateways.

Each gateway decides immediately, from the last balance that the ledger returned and its own spending since, and
synchronises with the ledger every 0.2 s. A quota is exceeded by at most the tokens that all gateways admit in that
time.
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
_IDLE_S = 120.0  # longer than an empty bucket takes to refill, so an idle bucket can be dropped

logger = logging.getLogger("ray.serve")


class OverQuota(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The key or the model has used its tokens of this minute."""

    code, status = "rate_limit_exceeded", 429


@dataclass(frozen=True)
class QuotaFlow:
    """The owner of a quota: `by` is "key" or "adapter", `name` that of the key or the model."""

    by: str
    name: str


@dataclass
class TokenBucket:
    """Token bucket with one minute of burst. A large request may overdraw it."""

    per_minute: int
    level: float
    at_s: float

    def level_at(self, now_s: float) -> float:
        """Return the tokens in the bucket. A clock that goes back adds nothing."""
        return min(self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60)

    def withdraw(self, tokens: float, now_s: float) -> float:
        """Remove tokens, or return them if negative. Returns the new level."""
        self.level, self.at_s = self.level_at(now_s) - tokens, now_s
        return self.level


@dataclass(frozen=True)
class Account:
    """A gateway's statement of one flow.

    Attributes:
        spent: tokens since the last synchronisation.
        level: the level of the bucket before `spent`, by the gateway's own count.
    """

    per_minute: int
    spent: float
    level: float


class Ledger:
    """The buckets of an application. A ledger without a bucket starts it at the level that a gateway states."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[QuotaFlow, TokenBucket] = {}

    def sync(self, accounts: Mapping[QuotaFlow, Account]) -> dict[QuotaFlow, float]:
        """Withdraw the tokens that a gateway has spent. Returns the new levels."""
        now_s = self._clock()
        self._buckets = {flow: bucket for flow, bucket in self._buckets.items() if now_s - bucket.at_s < _IDLE_S}
        levels = {}
        for flow, account in accounts.items():
            bucket = self._buckets.setdefault(flow, TokenBucket(account.per_minute, account.level, now_s))
            bucket.per_minute = account.per_minute
            levels[flow] = bucket.withdraw(account.spent, now_s)
        return levels


class LedgerClient(Protocol):
    """Sends accounts to `Ledger.sync`. Raises TimeoutError when the ledger does not answer."""

    def __call__(self, accounts: Mapping[QuotaFlow, Account]) -> Awaitable[Mapping[QuotaFlow, float]]: ...


class Quotas:
    """One gateway's copy of all quotas.

    Args:
        on_reject: called for each rejection with `QuotaFlow.by` and the model.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, ledger: LedgerClient, on_reject: Callable[[str, str], None] = lambda by, model: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._on_reject = on_reject
        self._clock = clock
        self._model_quotas: dict[str, int] = {}
        self._buckets: dict[QuotaFlow, TokenBucket] = {}
        self._used_s: dict[QuotaFlow, float] = {}
        self._unsynced: dict[QuotaFlow, float] = {}
        self._sync_task: asyncio.Task[None] | None = None

    def set_model_quotas(self, per_minute: Mapping[str, int]) -> None:
        """Set quotas by pattern of model names, such as `legal-*`. The first pattern that matches a name counts."""
        self._model_quotas = dict(per_minute)

    def check(self, key: ApiKey | None, model: str) -> None:
        """Raises OverQuota if the tokens of the key or the model are used up. Any thread may call it."""
        now_s = self._clock()
        for flow, per_minute in self._flows(key, model).items():
            bucket = self._buckets.setdefault(flow, TokenBucket(per_minute, per_minute, now_s))
            bucket.per_minute = per_minute
            if (level := bucket.level_at(now_s)) <= 0:
                self._on_reject(flow.by, model)
                raise OverQuota(_message(flow, per_minute), retry_after_s=math.ceil((1 - level) * 60 / per_minute))

    @contextlib.contextmanager
    def charge(self, key: ApiKey | None, model: str, tokens: int) -> Iterator[None]:
        """Charge a request; refund it if the context ends with an exception.

        Raises:
            OverQuota: see `check`.
        """
        flows = self._flows(key, model)
        self.check(key, model)
        self._spend(flows, tokens)
        try:
            yield
        except BaseException:
            self._spend(flows, -tokens)
            raise

    def _flows(self, key: ApiKey | None, model: str) -> dict[QuotaFlow, int]:
        flows = {}
        if key is not None and key.tokens_per_minute is not None:
            flows[QuotaFlow("key", key.name)] = key.tokens_per_minute
        for pattern, per_minute in self._model_quotas.items():
            if fnmatch.fnmatchcase(model, pattern):
                flows[QuotaFlow("adapter", model)] = per_minute
                break
        return flows

    def _spend(self, flows: Mapping[QuotaFlow, int], tokens: int) -> None:
        now_s = self._clock()
        for flow in flows:
            self._buckets[flow].withdraw(tokens, now_s)
            self._unsynced[flow] = self._unsynced.get(flow, 0.0) + tokens
            self._used_s[flow] = now_s
        if flows and (self._sync_task is None or self._sync_task.done()):
            self._sync_task = asyncio.ensure_future(self._sync_until_full())

    async def _sync_until_full(self) -> None:
        # An idle bucket that has refilled needs no more synchronisation.
        while self._used_s:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await self.sync()
            now_s = self._clock()
            for flow in [flow for flow, used_s in self._used_s.items() if now_s - used_s > _IDLE_S]:
                if self._buckets[flow].level_at(now_s) >= self._buckets[flow].per_minute:
                    for kept in (self._used_s, self._buckets, self._unsynced):
                        kept.pop(flow, None)

    async def sync(self) -> None:
        """Exchange spending and levels with the ledger. If it does not answer, the gateway's own count continues."""
        now_s = self._clock()
        sent = {}
        for flow in self._used_s:
            bucket, spent = self._buckets[flow], self._unsynced.pop(flow, 0.0)
            sent[flow] = Account(bucket.per_minute, spent, bucket.level_at(now_s) + spent)
        try:
            levels = await self._ledger(sent)
        except TimeoutError as error:
            logger.warning("quotas of this gateway are not shared with others until the ledger answers: %s", error)
            for flow, account in sent.items():
                self._unsynced[flow] = self._unsynced.get(flow, 0.0) + account.spent
            return
        now_s = self._clock()
        for flow, level in levels.items():  # tokens spent while the ledger answered are not in its level
            self._buckets[flow] = TokenBucket(sent[flow].per_minute, level - self._unsynced.get(flow, 0.0), now_s)


def _message(flow: QuotaFlow, per_minute: int) -> str:
    where = "its entry in the file of keys" if flow.by == "key" else "user_config of the Gateway"
    return (
        f"{flow.by} {flow.name!r}: expected at most {per_minute} tokens a minute (tokens_per_minute in {where}). "
        "Try again later"
    )
