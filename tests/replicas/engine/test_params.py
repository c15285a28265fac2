"""Parameters of text requests: what is refused, and what each choice asks of the sampler."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from ranklet.kernels.sampling_row import ROW_WIDTH, Column, Feature, features_of, rounded
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.sampling_values import SamplingValues, filler_columns

REFUSED: list[tuple[str, Any]] = [
    ("max_tokens", -1), ("max_tokens", 1.0), ("max_tokens", True), ("max_tokens", None),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("temperature", False),
    ("top_k", -2), ("top_k", 1.5),
    ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", math.nan),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
    ("logit_bias", ((1, 100.5),)), ("logit_bias", ((1, math.nan),)), ("logit_bias", ((-1, 1.0),)),
    ("logit_bias", ((1, 1.0), (1, 2.0))), ("logit_bias", tuple((i, 1.0) for i in range(1025))),
    ("allowed_token_ids", ()), ("allowed_token_ids", (-1,)), ("allowed_token_ids", (True,)),
    ("min_tokens", -1), ("min_tokens", 17),
    ("stop_token_ids", (-1,)), ("stop_token_ids", tuple(range(513))),
    ("ignore_eos", 1), ("n", 0), ("n", 129), ("seed", 1 << 63), ("seed", 0.5),
    ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", -1), ("cache_salt", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_values_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: expected .*, got ") as refused:
        GenerateParams(**{name: value})
    assert refused.value.param == name


def test_accepted_values() -> None:
    GenerateParams(
        max_tokens=0, temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, repetition_penalty=0.001,
        logit_bias=((0, -100), (5, 100.0)), allowed_token_ids=(3,), stop_token_ids=(2,), n=128, seed=-1, logprobs=0,
        prompt_logprobs=20, cache_salt="tenant",
    ).check(6)  # fmt: skip


def test_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        GenerateParams().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "params",
    [
        GenerateParams(logit_bias=((10, 1.0),)),
        GenerateParams(allowed_token_ids=(3, 10)),
        GenerateParams(stop_token_ids=(10,)),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params: GenerateParams) -> None:
    params.check(11)
    with pytest.raises(InvalidRequest, match="expected an integer from 0 to 9, got 10"):
        params.check(10)


def test_min_tokens_bans_the_ids_that_end_the_text() -> None:
    params = GenerateParams(min_tokens=3, stop_token_ids=(7,))
    values = params.sampling(seed=1, eos_ids=(8, 9), prompt_tokens=5)
    assert (values.banned_ids, values.banned_until) == ((7, 8, 9), 8)
    params = GenerateParams(min_tokens=3, stop_token_ids=(7,), ignore_eos=True)
    assert params.sampling(seed=1, eos_ids=(8, 9), prompt_tokens=5).banned_ids == (7,)
    assert GenerateParams(stop_token_ids=(7,)).sampling(seed=1, eos_ids=(8,), prompt_tokens=5).banned_ids == ()


def test_choices_have_their_own_seeds() -> None:
    made = [GenerateParams(n=128).sampling(seed=3, eos_ids=(), prompt_tokens=1, choice=i).seed for i in range(128)]
    assert len(set(made)) == 128
    assert made[0] == 3
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in made)


# Columns


def test_columns_hold_the_bits_of_the_values() -> None:
    values = SamplingValues(
        temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, presence_penalty=1.5, frequency_penalty=-0.5,
        repetition_penalty=2.0, seed=-2, logit_bias=((4, 1.5), (2, -100.0)), banned_ids=(4, 9), banned_until=6,
    )  # fmt: skip
    columns = values.columns(3)
    floats = columns.view(np.float32)
    assert columns.shape == (ROW_WIDTH,)
    assert columns[[Column.ROW, Column.POSITION, Column.TOP_K, Column.EDITS]].tolist() == [3, 0, 7, 3]
    assert floats[[Column.SCALE, Column.TOP_P, Column.PRESENCE, Column.FREQUENCY]].tolist() == [2.0, 0.75, 1.5, -0.5]
    assert floats[[Column.REPETITION, Column.PARDON]].tolist() == [2.0, 0.5]
    assert floats[Column.MIN_P] == np.float32(math.log(0.25))
    assert columns[[Column.SEED_LOW, Column.SEED_HIGH]].tolist() == [-2, -1]
    assert columns[[Column.PIECES_LOW, Column.PIECES_HIGH]].tolist() == [1, 0]
    ends = SamplingValues(banned_ids=(31 * 4096, 32 * 4096, 80 * 4096)).columns(0)
    assert ends[[Column.PIECES_LOW, Column.PIECES_HIGH]].tolist() == [-(1 << 31), 1 - (1 << 31)]
    edits = values.edits()
    assert edits[0].tolist() == [2, 4, 9]
    assert edits[1].view(np.float32).tolist() == [-100.0, 1.5, 0.0]
    assert edits[2].tolist() == [0, 6, 6]


@pytest.mark.parametrize(
    ("values", "features"),
    [
        (SamplingValues(), Feature(0)),
        (SamplingValues(top_k=5, top_p=0.5), Feature(0)),
        (SamplingValues(temperature=1.0), Feature.NOISE),
        (SamplingValues(temperature=1.0, top_k=1), Feature(0)),
        (SamplingValues(temperature=1.0, min_p=0.1), Feature.NOISE | Feature.TRUNCATE),
        (SamplingValues(repetition_penalty=1.1), Feature.PENALIZE),
        (SamplingValues(banned_ids=(1,)), Feature.EDIT),
        (SamplingValues(allowed_token_ids=(1,)), Feature.MASK),
        (SamplingValues(logprobs=0), Feature.LOGPROB),
        (SamplingValues(logprobs=1), Feature.LOGPROB | Feature.TOP),
    ],
)
def test_features(values: SamplingValues, features: Feature) -> None:
    assert values.features == features
    assert features_of(np.stack([filler_columns(4), values.columns(0)])) == features
    assert features in rounded(features)


def test_there_are_four_rounded_sets() -> None:
    assert len({rounded(Feature(bits)) for bits in range(128)}) == 4
    assert rounded(Feature(0)) == rounded(Feature.NOISE | Feature.TRUNCATE), "greedy and plain sampling share graphs"
