"""The number of homes of an adapter."""

from ranklet.routing.demand import Demand

HOME_WORK_PER_S = 50_000.0


def send(demand: Demand, per_s: int, seconds: float, start_s: float) -> float:
    """Send requests of 1000 units of work at a steady rate. Returns the time of the end."""
    for i in range(int(per_s * seconds)):
        now_s = start_s + i / per_s
        demand.add_request(1000, now_s)
        demand.update_homes(demand.work_per_s(now_s) / HOME_WORK_PER_S, 32, now_s)
    return start_s + seconds


def test_a_hot_adapter_gets_homes_at_once_and_loses_them_slowly() -> None:
    demand = Demand()
    now_s = send(demand, 400, 1.5, 0.0)  # work for 8 homes
    grown = demand.homes
    assert 5 <= grown <= 10
    now_s = send(demand, 1, 3, now_s + 2)
    assert demand.homes >= grown - 2
    send(demand, 1, 300, now_s)
    assert demand.homes == 1


def test_a_few_requests_are_no_rate() -> None:
    demand = Demand()
    for _ in range(3):
        demand.add_request(1_000_000, 0.0)
    assert demand.work_per_s(0.0) < 1_000_000
