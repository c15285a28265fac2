"""Requests out of bounds are refused before anything is queued, naming what was expected and what came."""

import numpy as np
import pytest

from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest

LIMITS = RequestLimits(max_model_len=10, hidden=64, vocab=100)


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


@pytest.mark.parametrize(("dimensions", "width"), [(None, 64), (32, 32), (64, 64), (33, 33)])
def test_what_is_in_bounds_gives_its_width(dimensions: int | None, width: int) -> None:
    assert LIMITS.check([tokens(0), tokens(*range(90, 100))], dimensions) == width


@pytest.mark.parametrize(
    ("prompts", "dimensions", "param", "says"),
    [
        ([], None, "input", "got none"),
        ([tokens(1), tokens()], None, "input", "input[1]: expected 1 to 10 tokens, got 0"),
        ([tokens(*range(11))], None, "input", "got 11"),
        ([np.zeros(40_000, np.int32)], None, "input", "got 40000"),
        ([tokens(3, 100, 5)], None, "input", "from 0 to 99, got 100"),
        ([tokens(-1, 5)], None, "input", "got -1"),
        ([tokens(2**31 - 1)], None, "input", str(2**31 - 1)),
        ([tokens(1)], 0, "dimensions", "32 to 64, got 0"),
        ([tokens(1)], 31, "dimensions", "got 31"),
        ([tokens(1)], 65, "dimensions", "got 65"),
        ([tokens(1)], -5, "dimensions", "got -5"),
    ],
)
def test_what_is_not_is_named(prompts: list[np.ndarray], dimensions: int | None, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LIMITS.check(prompts, dimensions)
    assert refused.value.param == param
    assert says in refused.value.message


def test_a_model_narrower_than_the_usual_minimum_takes_its_own_width() -> None:
    assert RequestLimits(10, hidden=16, vocab=5).check([tokens(1)], 16) == 16
