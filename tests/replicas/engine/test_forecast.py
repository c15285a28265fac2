"""Forecasts from the durations of earlier steps."""

import pytest

from ranklet.replicas.engine.forecast import Forecast


def test_the_small_step_is_the_smallest_that_is_not_much_slower() -> None:
    forecast = Forecast()
    assert forecast.small_tokens() is None
    cost_s = {4096: 0.010, 2048: 0.0052, 1024: 0.0030, 512: 0.0024}
    tried = []
    forecast.on_launch(4096, 0.0)
    forecast.on_finish(cost_s[4096], 0.0)
    for _ in range(6):
        small = forecast.small_tokens()
        assert small is not None
        tried.append(small)
        forecast.on_launch(small, 0.0)
        forecast.on_finish(cost_s[small], 0.0)
    assert tried == [2048, 1024, 2048, 2048, 2048, 2048]


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    forecast, slow_s = Forecast(), 0.05

    def run(tokens: int, took_s: float) -> None:
        forecast.on_launch(tokens, 0.0)
        forecast.on_finish(took_s, 0.0)

    run(4096, 0.010)
    run(2048, slow_s)  # kernels were compiled
    tried = []
    for _ in range(200):
        small = forecast.small_tokens()
        assert small is not None
        tried.append(small)
        run(small, small / 4096 * 0.010)
    assert tried[0] == 4096
    assert 2048 in tried[:80], "the size is never tried again"
    assert set(tried[100:]) <= {2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1}, (
        "the first, slow measurement is still used"
    )


def test_the_expected_time_is_zero_before_a_step_has_finished() -> None:
    forecast = Forecast()
    forecast.on_launch(1000, 5.0)
    assert (forecast.free_s, forecast.expected_s(1000)) == (5.0, 0.0)


def test_steps_run_one_after_the_other() -> None:
    forecast = Forecast()
    forecast.on_launch(1000, 5.0)
    forecast.on_finish(0.1, 5.1)
    forecast.on_launch(1000, 6.0)
    forecast.on_launch(800, 6.01)
    assert forecast.free_s == pytest.approx(6.18)
    forecast.on_finish(0.1, 6.12)  # 20 ms late, so the next is late too
    assert forecast.free_s == pytest.approx(6.2)
    forecast.on_finish(0.08, 6.2)
    assert forecast.free_s == pytest.approx(6.2)


def test_each_size_has_its_own_rate_and_unknown_sizes_take_the_nearest() -> None:
    forecast = Forecast()
    for tokens, took_s in ((100, 0.01), (10_000, 0.1)):
        forecast.on_launch(tokens, 0.0)
        forecast.on_finish(took_s, 0.0)
    assert forecast.expected_s(90) == pytest.approx(0.009)
    assert forecast.expected_s(9000) == pytest.approx(0.09)
    assert forecast.expected_s(30_000) == pytest.approx(0.3)
    assert forecast.expected_s(1) == pytest.approx(0.0001)


def test_enough_is_the_size_from_which_larger_steps_gain_nothing() -> None:
    forecast = Forecast()
    assert forecast.enough_tokens() is None
    for tokens, took_s, expected in (
        (6000, 0.0200, None),  # no larger size is known
        (100, 0.0030, None),  # slow per token: larger steps gain
        (30_000, 0.0980, 4096),  # two per cent faster than 6000
        (30_000, 0.0600, None),
    ):
        for _ in range(8):
            forecast.on_launch(tokens, 0.0)
            forecast.on_finish(took_s, 0.0)
        assert forecast.enough_tokens() == expected


def test_it_follows_a_device_that_slows_down() -> None:
    forecast = Forecast()
    for took_s in (0.1, *(0.2,) * 8):
        forecast.on_launch(1000, 0.0)
        forecast.on_finish(took_s, 0.0)
    assert forecast.expected_s(1000) == pytest.approx(0.2, rel=0.01)


def test_a_failed_step_is_not_waited_for() -> None:
    forecast = Forecast()
    forecast.on_launch(1000, 0.0)
    forecast.on_finish(0.1, 0.1)
    forecast.on_launch(1000, 0.2)
    forecast.on_launch(500, 0.2)
    forecast.on_failure()
    forecast.on_finish(0.05, 0.3)
    assert forecast.free_s == pytest.approx(0.3)
