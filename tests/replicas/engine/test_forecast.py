"""What the device is expected to do, from what it did."""

import pytest

from ranklet.replicas.engine.forecast import Forecast


def test_a_small_batch_is_the_smallest_that_is_worth_it() -> None:
    pace = Forecast()
    assert pace.small() is None
    cost_s = {4096: 0.010, 2048: 0.0052, 1024: 0.0030, 512: 0.0024}
    tried = []
    pace.launched(4096, 0.0)
    pace.landed(cost_s[4096], 0.0)
    for _ in range(6):
        small = pace.small()
        assert small is not None
        tried.append(small)
        pace.launched(small, 0.0)
        pace.landed(cost_s[small], 0.0)
    assert tried == [2048, 1024, 2048, 2048, 2048, 2048]


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    pace, slow_s = Forecast(), 0.05

    def land(tokens: int, took_s: float) -> None:
        pace.launched(tokens, 0.0)
        pace.landed(took_s, 0.0)

    land(4096, 0.010)
    land(2048, slow_s)  # it was compiled for
    tried = []
    for _ in range(200):
        small = pace.small()
        assert small is not None
        tried.append(small)
        land(small, small / 4096 * 0.010)
    assert tried[0] == 4096
    assert 2048 in tried[:80], "nobody looks at it again"
    assert set(tried[100:]) <= {2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1}, (
        "what it took first is not forgotten"
    )


def test_nothing_is_expected_before_a_batch_has_landed() -> None:
    pace = Forecast()
    pace.launched(1000, 5.0)
    assert (pace.free_s, pace.expected_s(1000)) == (5.0, 0.0)


def test_batches_run_one_after_the_other() -> None:
    pace = Forecast()
    pace.launched(1000, 5.0)
    pace.landed(0.1, 5.1)
    pace.launched(1000, 6.0)
    pace.launched(800, 6.01)
    assert pace.free_s == pytest.approx(6.18)
    pace.landed(0.1, 6.12)  # 20 ms late, and so is the next
    assert pace.free_s == pytest.approx(6.2)
    pace.landed(0.08, 6.2)
    assert pace.free_s == pytest.approx(6.2)


def test_each_size_has_its_own_rate_and_unknown_sizes_take_the_nearest() -> None:
    pace = Forecast()
    for tokens, took_s in ((100, 0.01), (10_000, 0.1)):
        pace.launched(tokens, 0.0)
        pace.landed(took_s, 0.0)
    assert pace.expected_s(90) == pytest.approx(0.009)
    assert pace.expected_s(9000) == pytest.approx(0.09)
    assert pace.expected_s(30_000) == pytest.approx(0.3)
    assert pace.expected_s(1) == pytest.approx(0.0001)


def test_enough_is_where_larger_batches_gain_nothing() -> None:
    pace = Forecast()
    assert pace.enough() is None
    for tokens, took_s, expected in (
        (6000, 0.0200, None),  # nobody knows about larger ones
        (100, 0.0030, None),  # slow a token, and 6000 gain
        (30_000, 0.0980, 4096),  # two per cent faster than 6000
        (30_000, 0.0600, None),
    ):
        for _ in range(8):
            pace.launched(tokens, 0.0)
            pace.landed(took_s, 0.0)
        assert pace.enough() == expected


def test_it_follows_a_device_that_slows_down() -> None:
    pace = Forecast()
    for took_s in (0.1, *(0.2,) * 8):
        pace.launched(1000, 0.0)
        pace.landed(took_s, 0.0)
    assert pace.expected_s(1000) == pytest.approx(0.2, rel=0.01)


def test_a_batch_that_failed_is_not_waited_for() -> None:
    pace = Forecast()
    pace.launched(1000, 0.0)
    pace.landed(0.1, 0.1)
    pace.launched(1000, 0.2)
    pace.launched(500, 0.2)
    pace.lost()
    pace.landed(0.05, 0.3)
    assert pace.free_s == pytest.approx(0.3)
