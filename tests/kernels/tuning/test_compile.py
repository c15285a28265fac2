"""Jobs in worker processes: those that fail, and those that end their process."""

import os

import pytest

from ranklet.kernels.tuning.compile import compile_all


def invert(x: float) -> float:
    """Raise for 0, and end the process for a negative number."""
    if x < 0:
        os._exit(1)
    return 1 / x


def test_results_of_processes_come_in_the_order_of_the_jobs() -> None:
    assert list(compile_all(invert, [1.0, 0.0, 2.0], workers=1)) == [True, False, True]


@pytest.mark.timeout(600)  # starts four processes that import torch
def test_a_job_that_crashes_its_process_does_not_stop_the_others() -> None:
    assert list(compile_all(invert, [1.0, -1.0, 2.0], workers=1)) == [True, False, True]
