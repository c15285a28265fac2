"""A text that goes on from tokens made by another engine is the text that would have come."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.generate import Generation, TextChoice
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import ref
from tests.replicas.streaming import TextSink, draw
from tests.replicas.text_scene import LOGPROB_ERROR

TOKENS = 40
PROMPTS = draw(9, 70)
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.8, "repetition_penalty": 1.5},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "min_p": 0.02, "logit_bias": ((7, 5.0), (8, -100.0))},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(100, 130))},
)
ENDS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True},
    {"stop_token_ids": tuple(range(3, 1024, 40))},
    {"stop_token_ids": tuple(range(3, 1024, 4)), "min_tokens": 25},
)


@dataclass(frozen=True)
class EnginePair:
    """Engines of one model. The second computes only texts that the first has begun."""

    first: Engine
    second: Engine
    adapter: AdapterRef

    def whole(self, adapter: AdapterRef | None, params: GenerateParams) -> Generation:
        sink = TextSink()
        self.first.submit(PROMPTS, adapter, params, sink)
        return sink.generation()

    def rest(self, adapter: AdapterRef | None, params: GenerateParams, given: list[NDArray[np.int32]]) -> TextSink:
        sink = TextSink()
        self.second.submit(PROMPTS, adapter, params, sink, given=given)
        sink.generation()
        return sink


@pytest.fixture(scope="module")
def pair(text_family: tuple[Path, list[AdapterSpec]]) -> Iterator[EnginePair]:
    folder, adapters = text_family
    config = EngineConfig(folder, slots=2, max_batch_tokens=1024, max_model_len=256, kv_cache_bytes=8 << 20)
    engines = Engine(config), Engine(config)
    for each in engines:
        each.start()
    yield EnginePair(*engines, ref(adapters[0].path))
    for each in engines:
        each.check_integrity()
        each.stop()


def check_rest(whole: TextChoice, rest: TextChoice, known: int) -> None:
    assert rest.tokens.tolist() == whole.tokens.tolist()
    assert (rest.finish_reason, rest.stop_token) == (whole.finish_reason, whole.stop_token)
    assert whole.logprobs is not None
    assert rest.logprobs is not None
    for before, after in zip(whole.logprobs[known:], rest.logprobs, strict=True):
        assert abs(before.logprob - after.logprob) < LOGPROB_ERROR
        ranked = zip(before.top, after.top, strict=True)
        assert all(abs(one[1] - other[1]) < LOGPROB_ERROR for one, other in ranked)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_rest_is_the_one_that_would_have_come(pair: EnginePair, data: st.DataObject) -> None:
    """Whatever the sampling, the way of its end and the number of tokens so far, which differs between choices."""
    n = data.draw(st.sampled_from((1, 1, 3)), "n")
    fields = {**data.draw(st.sampled_from(SAMPLING), "sampling"), **data.draw(st.sampled_from(ENDS), "ends")}
    seed = data.draw(st.integers(0, 9), "seed")
    params = GenerateParams(max_tokens=TOKENS, seed=seed, n=n, logprobs=2, **fields)
    adapter = data.draw(st.sampled_from((None, pair.adapter)), "adapter")
    whole = pair.whole(adapter, params)
    known = [data.draw(st.integers(0, len(choice.tokens) - 1), "known tokens") for choice in whole.choices]
    sink = pair.rest(adapter, params, [choice.tokens[:k] for choice, k in zip(whole.choices, known, strict=True)])
    rest = sink.generation()
    for index, (before, after, count) in enumerate(zip(whole.choices, rest.choices, known, strict=True)):
        check_rest(before, after, count)
        assert sink.tokens[index] == before.tokens[count:].tolist()
    assert rest.cached_tokens <= sum(map(len, PROMPTS))


def test_logprobs_of_the_prompt_come_with_the_rest(pair: EnginePair) -> None:
    params = GenerateParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=1)
    whole = pair.whole(None, params)
    rest = pair.rest(None, params, [choice.tokens[:20] for choice in whole.choices]).generation()
    assert whole.prompt_logprobs is not None
    assert rest.prompt_logprobs is not None
    for before, after, prompt in zip(whole.prompt_logprobs, rest.prompt_logprobs, PROMPTS, strict=True):
        assert len(before) == len(after) == len(prompt) - 1
        np.testing.assert_allclose(
            [each.logprob for each in after], [each.logprob for each in before], rtol=0, atol=LOGPROB_ERROR
        )


def test_given_tokens_are_shared_as_a_prefix_and_are_no_cached_tokens_of_the_prompt(pair: EnginePair) -> None:
    params = GenerateParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    whole = pair.whole(None, params)
    for _ in range(2):
        rest = pair.rest(None, params, [choice.tokens[:140] for choice in whole.choices]).generation()
        assert [each.tokens.tolist() for each in rest.choices] == [each.tokens.tolist() for each in whole.choices]
    assert rest.cached_tokens == 9 + 70, "of 128 and 192 tokens in whole pages"


@pytest.mark.parametrize("lengths", [(3,), (3, TOKENS), (0, 0, 0)])
def test_given_tokens_that_fit_no_text_are_refused(pair: EnginePair, lengths: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=f"expected 2 texts of less than {TOKENS} tokens to continue"):
        pair.second.submit(
            PROMPTS, None, GenerateParams(max_tokens=TOKENS), TextSink(), given=[np.zeros(n, np.int32) for n in lengths]
        )
