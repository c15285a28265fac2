"""Quotas: the tokens that pass match the quota, with any number of gateways, with the ledger or without."""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey
from ranklet.cluster.access.quota import TURN_S, OverQuota, Quotas
from ranklet.cluster.access.quota_ledger import Grant, Ledger, QuotaOwner, Statement, TokenBucket
from ranklet.replicas.errors import Saturated
from tests.virtual_time import run_in_virtual_time

MINUTE = 6000


@dataclass
class QuotaSite:
    """A clock, gateways, and a ledger that may stop answering."""

    now_s: float = 0.0
    is_down: bool = False
    asked: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(lambda: self.now_s)

    async def settle(self, statements: Mapping[QuotaOwner, Statement]) -> Mapping[QuotaOwner, Grant]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise TimeoutError
        return self.ledger.settle(statements)

    def gateway(self, quotas: Mapping[str, int]) -> Quotas:
        made = Quotas(self.settle, lambda by, model: self.rejected.append((by, model)), lambda: self.now_s)
        made.set_model_quotas(quotas)
        return made


def key(per_minute: int | None) -> ApiKey:
    return ApiKey(name="team", sha256="0" * 64, adapters=("*",), tokens_per_minute=per_minute)


async def passes(gateway: Quotas, tokens: int, model: str = "legal", of: ApiKey | None = None) -> bool:
    try:
        with await gateway.charge(of, model, tokens):
            return True
    except OverQuota:
        return False


@settings(max_examples=16, deadline=None)
@given(st.integers(1, 8), st.integers(1, 900), st.booleans())
@example(gateways=8, tokens=100, is_down=False)
def test_the_tokens_that_pass_match_the_quota(gateways: int, tokens: int, is_down: bool) -> None:
    """All gateways get far more requests than the quota permits, for three minutes."""

    async def run() -> int:
        site = QuotaSite(is_down=is_down)
        made = [site.gateway({"legal*": MINUTE}) for _ in range(gateways)]
        passed = 0
        for _ in range(int(180 / TURN_S)):
            for gateway in made:
                passed += tokens * await passes(gateway, tokens)
                await gateway.sync()
            site.now_s += TURN_S
        return passed

    passed = asyncio.run(run())
    # A full bucket at the start, and three minutes.
    assert passed <= (MINUTE * 4) * (gateways if is_down else 1)
    # With few tokens a request, the gateways get fewer tokens than the quota permits.
    assert passed >= min(0.95 * MINUTE * 4, 0.95 * tokens * gateways * 180 / TURN_S) - tokens * gateways


async def test_a_key_and_an_adapter_have_separate_quotas() -> None:
    site = QuotaSite()
    gateway = site.gateway({"legal": 600, "*": 6000})
    assert await passes(gateway, 600, "legal", key(1000))
    assert not await passes(gateway, 1, "legal", key(1000)), "the adapter's quota is used up"
    assert await passes(gateway, 400, "medical", key(1000))
    assert not await passes(gateway, 1, "medical", key(1000)), "the key's quota is used up"
    assert await passes(gateway, 1, "medical", None), "the adapter's quota is not"
    assert site.rejected == [("adapter", "legal"), ("key", "medical")]
    assert await passes(gateway, 10_000, "base", key(None)), "one request may overdraw a full bucket"
    assert not await passes(gateway, 1, "base", key(None))


async def test_a_refusal_contains_the_time_until_the_quota_has_tokens_again() -> None:
    site = QuotaSite()
    gateway = site.gateway({"legal": 600})
    assert await passes(gateway, 900)
    with pytest.raises(OverQuota, match="600 tokens a minute") as refused:
        await gateway.charge(None, "legal", 100)
    site.now_s += refused.value.retry_after_s - 1
    assert not await passes(gateway, 100)
    site.now_s += 1
    assert await passes(gateway, 100)
    site.now_s -= 3600
    assert not await passes(gateway, 1), "a clock that goes back adds no tokens"


async def test_a_check_charges_nothing_and_refuses_once_the_tokens_are_used_up() -> None:
    site = QuotaSite()
    gateway = site.gateway({"legal": 600})
    for _ in range(3):
        gateway.check(None, "legal")
    assert await passes(gateway, 600)
    with pytest.raises(OverQuota):
        gateway.check(None, "legal")
    gateway.check(None, "medical")


async def test_a_failed_request_costs_nothing() -> None:
    gateway = QuotaSite().gateway({"legal": 600})
    for _ in range(5):
        with pytest.raises(RuntimeError), await gateway.charge(None, "legal", 600):
            raise RuntimeError
    assert await passes(gateway, 600)


def test_a_failed_request_is_refunded_after_its_full_bucket_was_dropped() -> None:
    async def fail_late(gateway: Quotas) -> None:
        with await gateway.charge(None, "legal", 600):
            await asyncio.sleep(300)
            raise RuntimeError

    async def run() -> None:
        gateway = Quotas(QuotaSite().settle, clock=asyncio.get_running_loop().time)
        gateway.set_model_quotas({"legal": 600})
        with pytest.raises(RuntimeError):
            await fail_late(gateway)
        assert await passes(gateway, 600)
        assert not await passes(gateway, 1), "the refund does not overfill the bucket"

    run_in_virtual_time(run())


async def test_a_new_ledger_starts_at_the_levels_of_the_gateways() -> None:
    site = QuotaSite()
    gateway = site.gateway({"legal": 600})
    assert await passes(gateway, 600)
    await gateway.sync()
    site.ledger = Ledger(lambda: site.now_s)
    await gateway.sync()
    assert not await passes(gateway, 1)


async def test_spending_during_an_outage_of_the_ledger_reaches_it_later() -> None:
    site = QuotaSite(is_down=True)
    one, other = site.gateway({"legal": 600}), site.gateway({"legal": 600})
    assert await passes(one, 600)
    await one.sync()
    site.is_down = False
    assert await passes(other, 1)
    await other.sync()
    await one.sync()
    await other.sync()
    assert not await passes(other, 1)


async def test_gateways_share_a_quota_through_the_ledger() -> None:
    site = QuotaSite()
    one, other = site.gateway({"legal": 600}), site.gateway({"legal": 600})
    assert await passes(one, 600)
    await one.sync()
    assert not await passes(other, 1)
    other.set_model_quotas({"legal": 60_000})
    site.now_s += 1
    assert await passes(other, 1), "a larger quota takes effect at once"


async def test_gateways_that_are_asked_at_once_pass_no_more_than_one_would() -> None:
    """From the first moment. Requests that wait for the ledger are asked for together."""
    site = QuotaSite()
    gateways = [site.gateway({"legal": MINUTE}) for _ in range(4)]
    passed = await asyncio.gather(*(passes(gateway, 130) for gateway in gateways for _ in range(50)))
    assert sum(passed) == MINUTE // 130
    assert site.asked <= 3 * len(gateways)


async def test_a_gateway_in_use_seldom_asks_the_ledger() -> None:
    site = QuotaSite()
    gateway = site.gateway({"legal": 1000 * MINUTE})
    for _ in range(10):
        for _ in range(20):
            assert await passes(gateway, 50)
        await gateway.sync()
        site.now_s += TURN_S
    assert site.asked <= 10 + 25, "the turns, the requests of the first one, and few others"


async def test_a_ledger_that_hangs_delays_only_the_first_request() -> None:
    site = QuotaSite(is_down=True)
    gateway = site.gateway({"legal": 600})
    for _ in range(5):
        assert await passes(gateway, 100)
    assert site.asked == 1


async def test_output_that_overdraws_a_quota_refuses_the_next_requests_of_all_gateways() -> None:
    site = QuotaSite()
    one, other = site.gateway({"legal": 600}), site.gateway({"legal": 600})
    with await one.charge(None, "legal", 10) as charge:
        charge.add(700)
    await one.sync()
    assert not await passes(other, 1)
    site.now_s += 11
    assert not await passes(other, 1)
    site.now_s += 1
    assert await passes(other, 1)


def test_a_bucket_holds_one_minute_of_tokens_at_most() -> None:
    bucket = TokenBucket(600, 600, 0.0)
    assert bucket.level_at(1000) == 600
    assert bucket.withdraw(700, 0.0) == -100
    assert bucket.level_at(30) == 200


@pytest.mark.parametrize("others", [[("other", ""), ("third", "")], [("flood", "b"), ("flood", "c")]])
def test_neither_a_model_nor_a_key_can_use_the_whole_limit(others: list[tuple[str, str]]) -> None:
    counts: list[int] = []
    admission = Admission(10, counts.append)

    def enter(model: str, key_name: str) -> None:
        stack.enter_context(admission.admit())
        stack.enter_context(admission.admit_model(model, key_name))

    with ExitStack() as stack:
        for _ in range(8):
            enter("flood", "a")
        with (
            pytest.raises(Saturated, match="'flood' with key 'a'"),
            admission.admit(),
            admission.admit_model("flood", "a"),
        ):
            pass
        assert admission.in_flight == 8
        for other in others:
            enter(*other)
        with pytest.raises(Saturated, match="10"), admission.admit():
            pass
    assert admission.in_flight == counts[-1] == 0


async def test_a_quota_for_one_name_of_the_base_model_counts_by_any_of_them() -> None:
    gateway = Quotas(QuotaSite().settle, names_of=lambda model: ("base", "Org/Base") if model == "base" else (model,))
    gateway.set_model_quotas({"Org/*": 60, "legal[v2]": 60})
    for model in ("base", "legal[v2]"):
        assert await passes(gateway, 61, model)
        assert not await passes(gateway, 1, model)
    for _ in range(2):
        assert await passes(gateway, 61, "legalv")
