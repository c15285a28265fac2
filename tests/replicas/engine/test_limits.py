"""Requests out of bounds are refused; the message has the bounds and the value."""

import numpy as np
import pytest

from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest

LIMITS = RequestLimits(max_model_len=20, hidden=64, vocab=100, max_embedding_len=10)


def tokens(*ids: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


@pytest.mark.parametrize(("dimensions", "width"), [(None, 64), (1, 1), (32, 32), (64, 64), (33, 33)])
def test_the_width_is_that_of_the_request_or_the_model(dimensions: int | None, width: int) -> None:
    LIMITS.check_prompts([tokens(0), tokens(*range(90, 100))], 10)
    assert LIMITS.check_dimensions(dimensions) == width


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
        ([tokens(1)], 0, "dimensions", "1 to 64, got 0"),
        ([tokens(1)], 65, "dimensions", "got 65"),
        ([tokens(1)], -5, "dimensions", "got -5"),
    ],
)
def test_an_error_names_the_field_and_the_bounds(
    prompts: list[np.ndarray], dimensions: int | None, param: str, says: str
) -> None:
    def check() -> None:
        LIMITS.check_prompts(prompts, 10)
        LIMITS.check_dimensions(dimensions)

    with pytest.raises(InvalidRequest) as refused:
        check()
    assert refused.value.param == param
    assert says in refused.value.message


@pytest.mark.parametrize(("allowed", "said"), [((16, 32), "16, 32, 64"), ((), "64")])
def test_a_model_may_allow_some_widths_only(allowed: tuple[int, ...], said: str) -> None:
    limits = RequestLimits(20, 64, 100, 10, dimensions=allowed)
    for width in (*allowed, 64, None):
        assert limits.check_dimensions(width) == (width or 64)
    with pytest.raises(InvalidRequest, match=f"expected {said}, as the model's config.json lists, got 8"):
        limits.check_dimensions(8)


def test_an_unknown_token_id_is_refused_with_the_setting_of_clients_that_send_other_ids() -> None:
    with pytest.raises(InvalidRequest, match=r"got 100277.*check_embedding_ctx_length"):
        LIMITS.check_prompts([tokens(100_277)], 10)


def test_prompts_of_texts_may_be_longer_than_those_of_embeddings() -> None:
    prompts = [np.zeros(11, np.int32)]
    LIMITS.check_prompts(prompts, LIMITS.max_model_len)
    with pytest.raises(InvalidRequest, match="expected 1 to 10 tokens, got 11"):
        LIMITS.check_prompts(prompts, LIMITS.max_embedding_len)
