"""Quotas in tokens a minute, for a key or for a model, shared by all gateways.

A gateway spends only tokens that the ledger has granted to it. It asks the ledger when a request needs more, and every
0.2 s it returns what it does not need. So all gateways together let through what the quota permits, and the ledger is
asked for few of the requests. A request passes if the bucket has as many tokens as its prompts, or is full.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from ranklet.cluster.access.keys import ApiKey
from ranklet.cluster.access.quota_ledger import IDLE_S, Grant, Ledger, QuotaOwner, Statement, TokenBucket
from ranklet.cluster.names import matches
from ranklet.replicas.errors import RankletError

TURN_S = 0.2
_ROUNDING = 1e-6

logger = logging.getLogger("ray.serve")

AskLedger = Callable[[Mapping[QuotaOwner, Statement]], Awaitable[Mapping[QuotaOwner, Grant]]]


class OverQuota(RankletError):  # noqa: N818  # named as its siblings in replicas/errors.py
    """The key or the model has used its tokens of this minute."""

    code, status = "rate_limit_exceeded", 429


class Charge:
    """Charges the output of one request as it is made. A quota that it overdraws refuses the next requests."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self.output_tokens = 0
        self._spend = spend

    def add(self, tokens: int) -> None:
        self.output_tokens += tokens
        self._spend(tokens)


@dataclass
class _Share:
    """One gateway's share of one quota.

    Attributes:
        left: what the ledger had left, by its last answer.
        granted: tokens that may be spent. Negative if outputs have overdrawn it.
        needed: tokens that waiting requests need.
        spent: tokens since the last turn.
        owed: tokens that the gateway has granted to itself while the ledger was silent.
    """

    left: TokenBucket
    used_s: float
    granted: float = 0.0
    needed: float = 0.0
    spent: float = 0.0
    owed: float = 0.0

    def need(self, tokens: int) -> float:
        """Return the tokens that must be there for a request. Those of more than a minute need a full bucket."""
        return min(tokens, self.left.per_minute) - _ROUNDING

    def state(self, now_s: float, *, is_turn: bool) -> Statement:
        """Return the statement for the ledger. Between turns it returns nothing but an overdraft."""
        returned = self.granted if is_turn else min(0.0, self.granted)
        self.granted -= returned
        needed, left = max(0.0, self.needed - self.granted), self.left.level_at(now_s)
        statement = Statement(self.left.per_minute, returned, needed, self.spent, left)
        if is_turn:
            self.spent = 0.0
        return statement

    def take(self, grant: Grant, now_s: float) -> None:
        self.granted += grant.tokens
        self.left = TokenBucket(self.left.per_minute, grant.level, now_s)


class Quotas:
    """One gateway's shares of all quotas.

    Args:
        ledger: sends statements to `Ledger.settle`. Raises TimeoutError when the ledger does not answer.
        on_reject: called for each rejection with `QuotaOwner.by` and the model.
        clock: monotonic, in seconds.
        names_of: returns all names of a model.
    """

    def __init__(
        self, ledger: AskLedger, on_reject: Callable[[str, str], None] = lambda by, model: None,
        clock: Callable[[], float] = time.monotonic,
        names_of: Callable[[str], Sequence[str]] = lambda model: (model,),
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._on_reject = on_reject
        self._names_of = names_of
        self._clock = clock
        self._model_quotas: dict[str, int] = {}
        self._shares: dict[QuotaOwner, _Share] = {}
        self._asking = asyncio.Lock()
        self._own_ledger: Ledger | None = None  # in use while that of all gateways does not answer
        self._turns: asyncio.Task[None] | None = None

    def set_model_quotas(self, per_minute: Mapping[str, int]) -> None:
        """Set quotas by pattern of model names, such as `legal-*`. The first pattern that matches a model counts."""
        self._model_quotas = dict(per_minute)

    async def connect(self) -> None:
        """Reach the ledger before the first request waits for it, if models have quotas."""
        if self._model_quotas:
            with contextlib.suppress(TimeoutError):
                await self._ledger({})

    def check(self, key: ApiKey | None, model: str) -> None:
        """Raise OverQuota if the tokens of the key or the model are used up. Any thread may call it."""
        self._refuse(self._quotas_of(key, model), model, 1)

    async def charge(self, key: ApiKey | None, model: str, tokens: int) -> AbstractContextManager[Charge]:
        """Charge the prompts of a request. Raises OverQuota, see `check`.

        They are refunded if the context ends with an exception before the request has any output.
        """
        quotas = self._quotas_of(key, model)
        if quotas:
            shares = [self._share(owner, per_minute) for owner, per_minute in quotas.items()]
            if _are_short(shares, tokens):
                refuse = partial(self._refuse, quotas, model, tokens)
                refuse()
                await self._ask(shares, tokens, refuse)
            if _are_short(shares, tokens):
                self._refuse(quotas, model, tokens, granted_only=True)
            self._spend(quotas, tokens)
        return self._charged(quotas, tokens)

    @contextlib.contextmanager
    def _charged(self, quotas: Mapping[QuotaOwner, int], tokens: int) -> Iterator[Charge]:
        charge = Charge(partial(self._spend, quotas))
        try:
            yield charge
        except BaseException:
            if not charge.output_tokens:
                self._spend({owner: each for owner, each in quotas.items() if owner in self._shares}, -tokens)
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

    def _share(self, owner: QuotaOwner, per_minute: int) -> _Share:
        now_s = self._clock()
        share = self._shares.setdefault(owner, _Share(TokenBucket(per_minute, per_minute, now_s), now_s))
        share.left.per_minute = per_minute
        return share

    def _refuse(
        self, quotas: Mapping[QuotaOwner, int], model: str, tokens: int, *, granted_only: bool = False
    ) -> None:  # fmt: skip
        """Raise OverQuota if a quota has too few tokens for a request, by this gateway's count."""
        now_s = self._clock()
        for owner, per_minute in quotas.items():
            share = self._shares.get(owner)
            if share is None:  # its bucket is full
                continue
            share.left.per_minute = per_minute
            missing = share.need(tokens) - share.granted
            left = share.left.level_at(now_s)
            if missing > (0.0 if granted_only else left):
                self._on_reject(owner.by, model)
                wait_s = max(1, math.ceil((missing - left) * 60 / per_minute))
                raise OverQuota(_message(owner, per_minute), retry_after_s=wait_s)

    def _spend(self, quotas: Mapping[QuotaOwner, int], tokens: int) -> None:
        for owner, per_minute in quotas.items():
            share = self._share(owner, per_minute)
            share.granted -= tokens
            share.spent += tokens
            share.used_s = self._clock()
        if quotas and (self._turns is None or self._turns.done()):
            self._turns = asyncio.ensure_future(self._take_turns())

    async def _ask(self, shares: Sequence[_Share], tokens: int, refuse: Callable[[], None]) -> None:
        """Ask the ledger for the tokens that a request needs. Requests that come before its answer share the next call.

        Args:
            refuse: raises OverQuota if the answer to those before it says that there are too few tokens.
        """
        needs = [share.need(tokens) for share in shares]
        for share, need in zip(shares, needs, strict=True):
            share.needed += need
        try:
            if self._own_ledger is not None:
                self._settle_alone(self._own_ledger, self._statements())
                return
            async with self._asking:
                if _are_short(shares, tokens):
                    refuse()
                    await self._settle(self._statements())
        finally:
            for share, need in zip(shares, needs, strict=True):
                share.needed -= need

    async def _take_turns(self) -> None:
        while self._shares:
            await asyncio.sleep(TURN_S)
            await self.sync()
            now_s = self._clock()
            for owner, share in list(self._shares.items()):
                # An idle bucket that has refilled needs no more turns.
                if now_s - share.used_s > IDLE_S and share.left.level_at(now_s) >= share.left.per_minute:
                    del self._shares[owner]

    async def sync(self) -> None:
        """Return what is granted and not spent, and get tokens for the time until the next turn."""
        async with self._asking:
            await self._settle(self._statements(is_turn=True))

    def _statements(self, *, is_turn: bool = False) -> dict[QuotaOwner, Statement]:
        now_s = self._clock()
        return {owner: share.state(now_s, is_turn=is_turn) for owner, share in self._shares.items()}

    async def _settle(self, statements: Mapping[QuotaOwner, Statement]) -> None:
        """Settle with the ledger. If it does not answer, this gateway goes on alone."""
        owed = {owner: self._shares[owner].owed for owner in statements}
        try:
            grants = await self._ledger({owner: _with_debt(each, owed[owner]) for owner, each in statements.items()})
        except TimeoutError as error:
            if self._own_ledger is None:
                logger.warning("quotas of this gateway are not shared with others until the ledger answers: %s", error)
                self._own_ledger = Ledger(self._clock)
            self._settle_alone(self._own_ledger, statements)
            return
        self._own_ledger = None
        now_s = self._clock()
        for owner, grant in grants.items():
            self._shares[owner].owed -= owed[owner]
            self._shares[owner].take(grant, now_s)

    def _settle_alone(self, ledger: Ledger, statements: Mapping[QuotaOwner, Statement]) -> None:
        now_s = self._clock()
        for owner, grant in ledger.settle(statements).items():
            self._shares[owner].owed += grant.tokens - statements[owner].returned
            self._shares[owner].take(grant, now_s)


def _are_short(shares: Sequence[_Share], tokens: int) -> bool:
    return any(share.granted < share.need(tokens) for share in shares)


def _with_debt(statement: Statement, owed: float) -> Statement:
    """Add what this gateway granted itself while the ledger did not answer.

    The level, which only a ledger without this bucket reads, is the one before that.
    """
    return replace(statement, returned=statement.returned - owed, level=statement.level + owed)


def _message(owner: QuotaOwner, per_minute: int) -> str:
    where = "its entry in the file of keys" if owner.by == "key" else "user_config of the Gateway"
    return (
        f"{owner.by} {owner.name!r}: expected at most {per_minute} tokens a minute (tokens_per_minute in {where}). "
        "Try again later"
    )
