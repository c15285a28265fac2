"""Results of text calls survive their message, and those that no message can carry are refused."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklet.cluster.text_result import (
    MAX_PROMPT_RESULT_BYTES,
    ChoiceResult,
    GenerateResult,
    PackedLogprobs,
    prompt_result_bytes,
)
from ranklet.replicas.engine.generate import Generation, TextChoice
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.sampled import TokenLogprob

FLOATS = st.floats(-1e4, 0, width=32) | st.just(float("-inf"))


@st.composite
def logprobs(draw: st.DrawFn) -> list[TokenLogprob]:
    count = draw(st.sampled_from((0, 1, 5)))
    tops = st.lists(st.tuples(st.integers(0, 151_935), FLOATS), min_size=count, max_size=count).map(tuple)
    return draw(st.lists(st.builds(TokenLogprob, FLOATS, tops), max_size=6))


@given(logprobs(), st.integers(0, 6))
def test_logprobs_survive_packing(tokens: list[TokenLogprob], start: int) -> None:
    packed = pickle.loads(pickle.dumps(PackedLogprobs.of(tokens)))
    assert packed.unpack() == tuple(tokens)
    assert packed.unpack(start) == tuple(tokens[start:])


def test_a_result_is_that_of_the_engine() -> None:
    scores = (TokenLogprob(-0.5, ((3, -0.5), (9, -1.5))), TokenLogprob(-2.0, ((4, -1.0), (9, -2.0))))
    choices = (
        TextChoice(np.array([5, 7], np.int32), "stop", 7, scores),
        TextChoice(np.array([], np.int32), "length"),
    )
    result = pickle.loads(pickle.dumps(GenerateResult.of(Generation(choices, 64, ((), scores)))))
    first, second = result.choices
    assert (first.ids().tolist(), first.finish_reason, first.stop_token) == ([5, 7], "stop", 7)
    assert first.logprobs.unpack() == scores
    assert second == ChoiceResult(b"", "length")
    assert result.cached_tokens == 64
    assert [each.unpack() for each in result.prompt_logprobs] == [(), scores]
    assert len(first.logprobs.logprobs + first.logprobs.top_ids + first.logprobs.top_logprobs) == 2 * (4 + 2 * 8)


def test_the_size_of_a_result_is_bounded() -> None:
    assert prompt_result_bytes(GenerateParams(max_tokens=100), 10**6) < 1000
    sizes = [prompt_result_bytes(GenerateParams(max_tokens=100, n=2, logprobs=count), 7) for count in (0, 20)]
    assert sizes[1] - sizes[0] == 2 * 100 * 20 * 8
    assert prompt_result_bytes(GenerateParams(max_tokens=1, prompt_logprobs=0), 1000) > 4000
    with pytest.raises(InvalidRequest, match="max_tokens: expected texts and logprobs of at most 3584 KiB") as refused:
        prompt_result_bytes(GenerateParams(max_tokens=32_000, logprobs=20), 7)
    assert refused.value.param == "max_tokens"
    assert MAX_PROMPT_RESULT_BYTES < 4 << 20
