"""Jobs in worker processes: those that fail, and those that end their process."""

import os

from ranklet.kernels.tuning.compile import compile_all


def invert(x: float) -> float:
    """Raise for 0, and end the process for a negative number."""
    if x < 0:
        os._exit(1)
    return 1 / x


def test_results_come_in_the_order_of_the_jobs_also_if_one_crashes_its_process() -> None:
    jobs = [1.0, 0.0, -1.0, 2.0, 0.0]
    assert list(compile_all(invert, jobs, workers=1)) == [True, False, False, True, False]
