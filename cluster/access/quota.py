"""Quotas in tokens a minute, for a key or for a model, shared by all gateways.

Each gateway decides immediately, from the last balance that the ledger returned and its own spending since, and
synchronises with the ledger every 0.2 s. A quota is exceeded by at most the tokens that all gateways admit in that
time.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ranklet.cluster.access.keys import ApiKey
from ranklet.cluster.names import matches
from ranklet.replicas.errors import RankletError

SYNC_INTERVAL_S = 0.2
_IDLE_S = 120.0  # longer than an empty bucket takes to refill, so an idle bucket can be dropped

logger = logging.getLogger("ray.serve")


class OverQuota(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The key or the model has used its tokens of this minute."""

    code, status = "rate_limit_exceeded", 429


@dataclass(frozen=True)
class QuotaOwner:
    """The owner of a quota: `by` is "key" or "adapter", `name` is the name of the key or the model."""

    by: str
    name: str


@dataclass
class TokenBucket:
    """Token bucket with one minute of burst. A large request may overdraw it."""

    per_minute: int
    level: float
    at_s: float

    def level_at(self, now_s: float) -> float:
        """Return the tokens in the bucket. If the clock has gone back, no tokens are added."""
        return min(self.per_minute, self.level + max(0.0, now_s - self.at_s) * self.per_minute / 60)

    def withdraw(self, tokens: float, now_s: float) -> float:
        """Remove tokens, or add them if negative. Returns the new level."""
        self.level, self.at_s = self.level_at(now_s) - tokens, now_s
        return self.level


@dataclass(frozen=True)
class Account:
    """A gateway's statement about one quota.

    Attributes:
        spent: tokens since the last synchronisation.
        level: tokens in the bucket before `spent`, by the gateway's own count.
    """

    per_minute: int
    spent: float
    level: float


class Ledger:
    """The buckets of all quotas of an application. A missing bucket starts at the level that a gateway states."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[QuotaOwner, TokenBucket] = {}

    def sync(self, accounts: Mapping[QuotaOwner, Account]) -> dict[QuotaOwner, float]:
        """Withdraw the tokens that a gateway has spent. Returns the new levels."""
        now_s = self._clock()
        self._buckets = {owner: bucket for owner, bucket in self._buckets.items() if now_s - bucket.at_s < _IDLE_S}
        levels = {}
        for owner, account in accounts.items():
            bucket = self._buckets.setdefault(owner, TokenBucket(account.per_minute, account.level, now_s))
            bucket.per_minute = account.per_minute
            levels[owner] = bucket.withdraw(account.spent, now_s)
        return levels


class Charge:
    """Charges the output of one request as it is made. A quota that it overdraws refuses the next requests."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self.output_tokens = 0
        self._spend = spend

    def add(self, tokens: int) -> None:
        self.output_tokens += tokens
        self._spend(tokens)


class Quotas:
    """One gateway's buckets of all quotas. A bucket that does not exist is full.

    Args:
        ledger: sends accounts to `Ledger.sync`. Raises TimeoutError when the ledger does not answer.
        on_reject: called for each rejection with `QuotaOwner.by` and the model.
        clock: monotonic, in seconds.
        names_of: returns all names of a model.
    """

    def __init__(
        self, ledger: Callable[[Mapping[QuotaOwner, Account]], Awaitable[Mapping[QuotaOwner, float]]],
        on_reject: Callable[[str, str], None] = lambda by, model: None, clock: Callable[[], float] = time.monotonic,
        names_of: Callable[[str], Sequence[str]] = lambda model: (model,),
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._on_reject = on_reject
        self._names_of = names_of
        self._clock = clock
        self._model_quotas: dict[str, int] = {}
        self._buckets: dict[QuotaOwner, TokenBucket] = {}
        self._used_s: dict[QuotaOwner, float] = {}
        self._unsynced: dict[QuotaOwner, float] = {}
        self._sync_task: asyncio.Task[None] | None = None

    def set_model_quotas(self, per_minute: Mapping[str, int]) -> None:
        """Set quotas by pattern of model names, such as `legal-*`. The first pattern that matches a model counts."""
        self._model_quotas = dict(per_minute)

    def check(self, key: ApiKey | None, model: str) -> None:
        """Raise OverQuota if the tokens of the key or the model are used up. Any thread may call it."""
        now_s = self._clock()
        for owner, per_minute in self._quotas_of(key, model).items():
            bucket = self._buckets.get(owner)
            if bucket is None:  # it is full
                continue
            bucket.per_minute = per_minute
            if (level := bucket.level_at(now_s)) <= 0:
                self._on_reject(owner.by, model)
                raise OverQuota(_message(owner, per_minute), retry_after_s=math.ceil((1 - level) * 60 / per_minute))

    @contextlib.contextmanager
    def charge(self, key: ApiKey | None, model: str, tokens: int) -> Iterator["Charge"]:
        """Charge the prompts of a request. Raises OverQuota, see `check`.

        They are refunded if the context ends with an exception before the request has any output.
        """
        quotas = self._quotas_of(key, model)
        self.check(key, model)
        charge = Charge(partial(self._spend, quotas))
        self._spend(quotas, tokens)
        try:
            yield charge
        except BaseException:
            if not charge.output_tokens:
                self._spend(quotas, -tokens)
            raise

    def _quotas_of(self, key: ApiKey | None, model: str) -> dict[QuotaOwner, int]:
        quotas = {}
        if key is not None and key.tokens_per_minute is not None:
            quotas[QuotaOwner("key", key.name)] = key.tokens_per_minute
        names = self._names_of(model)
        for pattern, per_minute in self._model_quotas.items():
            if matches(pattern, names):
                quotas[QuotaOwner("adapter", model)] = per_minute
                break
        return quotas

    def _spend(self, quotas: Mapping[QuotaOwner, int], tokens: int) -> None:
        now_s = self._clock()
        for owner, per_minute in quotas.items():
            self._buckets.setdefault(owner, TokenBucket(per_minute, per_minute, now_s)).withdraw(tokens, now_s)
            self._unsynced[owner] = self._unsynced.get(owner, 0.0) + tokens
            self._used_s[owner] = now_s
        if quotas and (self._sync_task is None or self._sync_task.done()):
            self._sync_task = asyncio.ensure_future(self._sync_until_full())

    async def _sync_until_full(self) -> None:
        # An idle bucket that has refilled needs no more synchronisation.
        while self._used_s:
            await asyncio.sleep(SYNC_INTERVAL_S)
            await self.sync()
            now_s = self._clock()
            for owner in [owner for owner, used_s in self._used_s.items() if now_s - used_s > _IDLE_S]:
                if self._buckets[owner].level_at(now_s) >= self._buckets[owner].per_minute:
                    for kept in (self._used_s, self._buckets, self._unsynced):
                        kept.pop(owner, None)

    async def sync(self) -> None:
        """Exchange spending and levels with the ledger. If it does not answer, the gateway's own count continues."""
        now_s = self._clock()
        sent = {}
        for owner in self._used_s:
            bucket, spent = self._buckets[owner], self._unsynced.pop(owner, 0.0)
            sent[owner] = Account(bucket.per_minute, spent, bucket.level_at(now_s) + spent)
        try:
            levels = await self._ledger(sent)
        except TimeoutError as error:
            logger.warning("quotas of this gateway are not shared with others until the ledger answers: %s", error)
            for owner, account in sent.items():
                self._unsynced[owner] = self._unsynced.get(owner, 0.0) + account.spent
            return
        now_s = self._clock()
        for owner, level in levels.items():  # tokens spent while the ledger answered are not in its level
            self._buckets[owner] = TokenBucket(sent[owner].per_minute, level - self._unsynced.get(owner, 0.0), now_s)


def _message(owner: QuotaOwner, per_minute: int) -> str:
    where = "its entry in the file of keys" if owner.by == "key" else "user_config of the Gateway"
    return (
        f"{owner.by} {owner.name!r}: expected at most {per_minute} tokens a minute (tokens_per_minute in {where}). "
        "Try again later"
    )
