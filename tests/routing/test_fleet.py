"""The replicas' reports as a router stores them."""

import math

import pytest

from ranklet.routing.fleet import Fleet, Member
from ranklet.routing.report import QueueLoad
from tests.routing.given import RATE, load

NOW_S = 1000.0


def fleet() -> Fleet:
    made = Fleet()
    made.set_members([Member("r0", 0), Member("r1", 1)], NOW_S)
    made.update_load("r0", load(), NOW_S)
    return made


@pytest.mark.parametrize(
    "impossible", [load(2, -5), load(2, 1 << 60), load(2, math.nan), load(2, done=-1), load(2, received=math.inf)]
)
def test_a_load_with_impossible_work_is_rejected(impossible: QueueLoad) -> None:
    made = fleet()
    assert not made.update_load("r0", impossible, NOW_S)
    assert made.waits(NOW_S).tolist() == [0, 0]


@pytest.mark.parametrize("rate", [5e-324, 1e-9, -1.0, 1e300, math.inf, math.nan])
def test_a_load_with_an_impossible_rate_is_rejected(rate: float) -> None:
    made = fleet()
    assert not made.update_load("r0", load(2, rate=rate), NOW_S)
    assert made.rates.tolist() == [RATE, RATE]
    made.add_request(1, 0, 2**40, NOW_S)
    assert math.isfinite(made.waits(NOW_S)[0])


def test_a_replica_without_a_measured_rate_is_assumed_as_fast_as_the_others() -> None:
    made = Fleet()
    made.set_members([Member("r0", 0), Member("r1", 1)], NOW_S)
    made.update_load("r0", load(rate=3 * RATE), NOW_S)
    assert made.rates.tolist() == [3 * RATE, 3 * RATE]


def test_work_of_other_routers_is_assumed_the_more_the_older_the_last_report() -> None:
    made = fleet()
    made.set_gateways(2, 1)  # r0 is the other router's
    waits = []
    for request, age_s in enumerate((0.0, 0.5, 1.0, 9.0)):
        made.waits(NOW_S + age_s)
        made.add_request(request, 0, RATE, NOW_S + age_s)
        waits.append(made.waits(NOW_S + age_s)[0] + age_s)
        made.complete_request(request, arrived=False)
    assert waits == pytest.approx([1.0, 1.5, 2.0, 10.0])
