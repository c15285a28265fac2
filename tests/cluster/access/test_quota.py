"""Quotas: what passes in the end is what was granted, through however many gateways, with the ledger or without."""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey
from ranklet.cluster.access.quota import SYNC_INTERVAL_S, Account, Ledger, OverQuota, QuotaFlow, Quotas, TokenBucket
from ranklet.replicas.errors import Saturated

MINUTE = 6000


@dataclass
class Site:
    """A clock, a ledger that may fall silent, and gateways."""

    now_s: float = 0.0
    silent: bool = False
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(lambda: self.now_s)

    async def settle(self, accounts: Mapping[QuotaFlow, Account]) -> Mapping[QuotaFlow, float]:
        if self.silent:
            raise TimeoutError
        return self.ledger.sync(accounts)

    def gateway(self, quotas: Mapping[str, int]) -> Quotas:
        made = Quotas(self.settle, lambda by, model: self.rejected.append((by, model)), lambda: self.now_s)
        made.set_model_quotas(quotas)
        return made


def key(per_minute: int | None) -> ApiKey:
    return ApiKey(name="team", sha256="0" * 64, adapters=("*",), tokens_per_minute=per_minute)


def passes(gateway: Quotas, tokens: int, model: str = "legal", of: ApiKey | None = None) -> bool:
    try:
        with gateway.charge(of, model, tokens):
            return True
    except OverQuota:
        return False


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 900), st.booleans())
def test_what_passes_is_the_quota(gateways: int, tokens: int, silent: bool) -> None:
    """All gateways are asked far more often than granted, for three minutes."""

    async def run() -> int:
        site = Site(silent=silent)
        made = [site.gateway({"legal*": MINUTE}) for _ in range(gateways)]
        passed = 0
        for _ in range(int(180 / SYNC_INTERVAL_S)):
            for gateway in made:
                passed += tokens * passes(gateway, tokens)
                await gateway.sync()
            site.now_s += SYNC_INTERVAL_S
        return passed

    passed = asyncio.run(run())
    # A full bucket to begin with, three minutes, and each gateway's last request, which may leave a debt.
    most = (MINUTE * 4) * (gateways if silent else 1) + tokens * gateways
    assert passed <= most
    # A gateway asks for no more than this.
    assert passed >= min(0.95 * MINUTE * 4, 0.95 * tokens * gateways * 180 / SYNC_INTERVAL_S) - tokens * gateways


async def test_a_key_and_an_adapter_each_have_their_own() -> None:
    site = Site()
    gateway = site.gateway({"legal": 600, "*": 6000})
    assert passes(gateway, 600, "legal", key(1000))
    assert not passes(gateway, 1, "legal", key(1000)), "the adapter's is used up"
    assert passes(gateway, 400, "medical", key(1000))
    assert not passes(gateway, 1, "medical", key(1000)), "the key's is"
    assert passes(gateway, 1, "medical", None), "not the adapter's"
    assert site.rejected == [("adapter", "legal"), ("key", "medical")]
    assert passes(gateway, 10_000, "base", key(None)), "more than a minute's at once is let through, once"
    assert not passes(gateway, 1, "base", key(None))


async def test_a_refusal_says_when_to_come_back() -> None:
    site = Site()
    gateway = site.gateway({"legal": 600})
    assert passes(gateway, 900)
    with pytest.raises(OverQuota, match="600 tokens a minute") as refused, gateway.charge(None, "legal", 1):
        pass
    site.now_s += refused.value.retry_after_s
    assert passes(gateway, 100)
    site.now_s -= 3600
    assert not passes(gateway, 1), "a clock that jumps back grants nothing"


async def test_what_fails_costs_nothing() -> None:
    gateway = Site().gateway({"legal": 600})
    for _ in range(5):
        with pytest.raises(RuntimeError), gateway.charge(None, "legal", 600):
            raise RuntimeError
    assert passes(gateway, 600)


async def test_a_new_ledger_begins_with_what_gateways_believe() -> None:
    site = Site()
    gateway = site.gateway({"legal": 600})
    assert passes(gateway, 600)
    await gateway.sync()
    site.ledger = Ledger(lambda: site.now_s)
    await gateway.sync()
    assert not passes(gateway, 1)


async def test_what_the_ledger_missed_it_hears_later() -> None:
    site = Site(silent=True)
    one, other = site.gateway({"legal": 600}), site.gateway({"legal": 600})
    assert passes(one, 600)
    await one.sync()
    site.silent = False
    assert passes(other, 1)
    await other.sync()
    await one.sync()
    await other.sync()
    assert not passes(other, 1)


async def test_gateways_learn_of_each_other() -> None:
    site = Site()
    one, other = site.gateway({"legal": 600}), site.gateway({"legal": 600})
    assert passes(one, 600)
    await one.sync()
    assert passes(other, 1), "not yet settled"
    await other.sync()
    assert not passes(other, 1)
    other.set_model_quotas({"legal": 60_000})
    site.now_s += 1
    assert passes(other, 1), "a larger quota is in force at once"


def test_a_bucket_holds_a_minute_and_no_more() -> None:
    bucket = TokenBucket(600, 600, 0.0)
    assert bucket.level_at(1000) == 600
    assert bucket.take(700, 0.0) == -100
    assert bucket.level_at(30) == 200


def test_one_models_requests_leave_room_for_others() -> None:
    told: list[int] = []
    admission = Admission(10, told.append)

    def enter(model: str) -> None:
        stack.enter_context(admission.admit())
        stack.enter_context(admission.admit_model(model))

    with ExitStack() as stack:
        for _ in range(8):
            enter("flood")
        with pytest.raises(Saturated, match="flood"), admission.admit(), admission.admit_model("flood"):
            pass
        assert admission.in_flight == 8
        enter("other")
        enter("third")
        with pytest.raises(Saturated, match="10"), admission.admit():
            pass
    assert admission.in_flight == told[-1] == 0
