"""Draws: the torch code against float64, Triton (interpreted and compiled) against the torch code."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranklet.kernels.adjust import adjusted
from ranklet.kernels.sampling_row import Column, Feature
from ranklet.replicas.model.sampling_values import SamplingValues, filler_columns
from tests.kernels.sampling import SamplingStep, assert_same, changed64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 397
ALLOWED = tuple(range(0, VOCAB, 3))
PENALTIES = SamplingValues(repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=-0.4)
EDITED = SamplingValues(logit_bias=((3, 5.0), (396, -2.0), (0, 100.0)), banned_ids=(0, 7), banned_until=41)
MIX = [
    SamplingValues(),
    SamplingValues(temperature=0.7, seed=5),
    SamplingValues(temperature=1.0, top_k=5, seed=-5, logprobs=3),
    SamplingValues(temperature=1.5, top_p=0.9, seed=1 << 40),
    PENALTIES,
    EDITED,
    SamplingValues(allowed_token_ids=ALLOWED, logprobs=0),
    SamplingValues(
        temperature=0.9, seed=4, min_p=0.01, top_p=0.99, top_k=40, repetition_penalty=1.2, frequency_penalty=0.3,
        logit_bias=((9, 2.0),), banned_ids=(12,), banned_until=50, allowed_token_ids=ALLOWED, logprobs=20,
    ),
]  # fmt: skip


def make_logits(rows: int, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab)


def random_values(rng: random.Random, vocab: int) -> SamplingValues:
    return SamplingValues(
        temperature=rng.choice([0.0, 0.2, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 2, 7, 100, 550, 3000]),
        top_p=rng.choice([1.0, 0.2, 0.9, 0.99]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, -0.5]),
        repetition_penalty=rng.choice([1.0, 1.4]),
        seed=rng.randrange(-(1 << 63), 1 << 63),
        logit_bias=tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(vocab), rng.choice([0, 3, 20]))),
        banned_ids=tuple(rng.sample(range(vocab), rng.choice([0, 2]))),
        banned_until=rng.choice([0, 41]),
        allowed_token_ids=rng.choice([None, None, tuple(rng.sample(range(vocab), 20))]),
        logprobs=rng.choice([None, 0, 5]),
    )


@pytest.mark.parametrize("values", [PENALTIES, EDITED, MIX[6], MIX[7]])
def test_changes_agree_with_float64(values: SamplingValues) -> None:
    step, logits = SamplingStep(VOCAB, [values], torch.device("cpu")), make_logits(1)
    found = adjusted(logits, torch.from_numpy(step.columns), step.sampler().tables, step.features)
    expected = changed64(logits[0].numpy(), values, step.prompts[0], step.outputs[0], 40)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("position", [40, 41])
def test_bans_end_at_their_position(position: int) -> None:
    step, logits = SamplingStep(VOCAB, [EDITED], DEVICE), make_logits(1)
    step.columns[:, Column.POSITION] = position
    assert (step.by_torch(logits).tokens.item() == 0) == (position == 41)  # token 0 has a bias of 100
    assert_same(step.by_kernels(logits), step.by_torch(logits))


@pytest.mark.parametrize("seed", range(3))
def test_kernels_agree_with_torch(seed: int) -> None:
    torch.manual_seed(seed)
    step, logits = SamplingStep(VOCAB, MIX, DEVICE), make_logits(len(MIX))
    assert_same(step.by_kernels(logits), step.by_torch(logits), asks_top=[2, 7])


@pytest.mark.parametrize("values", MIX)
def test_kernels_agree_with_torch_without_other_features(values: SamplingValues) -> None:
    step, logits = SamplingStep(VOCAB, [values], DEVICE), make_logits(1)
    assert_same(step.by_kernels(logits), step.by_torch(logits))


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.sampled_from([33, 129, 600, 4097]))
def test_kernels_agree_with_torch_on_random_rows(rng: random.Random, vocab: int) -> None:
    torch.manual_seed(rng.randrange(1 << 30))
    step = SamplingStep(vocab, [random_values(rng, vocab) for _ in range(4)], DEVICE)
    logits = torch.randn(4, vocab) * rng.choice([0.1, 1.0, 5.0])
    assert_same(step.by_kernels(logits), step.by_torch(logits))


def test_several_pieces_of_the_vocabulary() -> None:
    vocab = 2 * 4096 + 5
    mix = [
        SamplingValues(), SamplingValues(temperature=1.0), SamplingValues(temperature=1.0, top_p=0.5),
        SamplingValues(logit_bias=((8196, 60.0), (4095, 59.0))),
        SamplingValues(temperature=1.0, top_k=2, logit_bias=((8196, 60.0), (4096, 60.0)), logprobs=5),
    ]  # fmt: skip
    step, logits = SamplingStep(vocab, mix, DEVICE), make_logits(len(mix), vocab)
    expected = step.by_torch(logits)
    assert expected.tokens[3] == 8196
    assert_same(step.by_kernels(logits), expected, asks_top=[4])


def test_a_token_does_not_depend_on_the_other_rows() -> None:
    step, logits = SamplingStep(VOCAB, MIX, DEVICE), make_logits(len(MIX))
    together = step.by_kernels(logits).tokens.tolist()
    for row, values in enumerate(MIX):
        alone = SamplingStep(VOCAB, [values], DEVICE)
        alone.prompts, alone.outputs = [step.prompts[row]], [step.outputs[row]]
        assert alone.by_kernels(logits[row : row + 1]).tokens.tolist() == [together[row]]
        everything = step.features | Feature.TOP | Feature.LOGPROB
        assert alone.by_kernels(logits[row : row + 1], everything).tokens.tolist() == [together[row]]
    reverse = SamplingStep(VOCAB, MIX[::-1], DEVICE)
    reverse.prompts, reverse.outputs = step.prompts[::-1], step.outputs[::-1]
    assert reverse.by_kernels(logits.flip(0)).tokens.tolist() == together[::-1]


def test_ties_go_to_the_lower_id() -> None:
    step, logits = SamplingStep(VOCAB, [SamplingValues(logprobs=20)], DEVICE), torch.zeros(1, VOCAB)
    logits[0, [300, 200]] = 1.0
    for drawn in (step.by_torch(logits), step.by_kernels(logits)):
        assert drawn.tokens.tolist() == [200]
        assert drawn.top_ids is not None
        assert drawn.top_ids[0].tolist() == [200, 300, *range(18)]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_is_not_finite_fails_alone() -> None:
    mix = [*MIX, SamplingValues(allowed_token_ids=(5,), banned_ids=(5,), banned_until=99)]
    step, logits = SamplingStep(VOCAB, mix, DEVICE), make_logits(len(mix))
    valid = step.by_torch(logits).tokens.tolist()
    logits[1, 7], logits[3, 396], logits[7, 1], logits[4, 0] = torch.nan, torch.nan, torch.nan, torch.inf
    for drawn in (step.by_torch(logits), step.by_kernels(logits)):
        tokens = drawn.tokens.tolist()
        assert [row for row, token in enumerate(tokens) if token == -1] == [1, 3, 4, 7, 8]
        assert all(token in (-1, valid[row]) for row, token in enumerate(tokens))
        assert drawn.logprobs is not None
        assert math.isnan(drawn.logprobs[7])


def test_draws_follow_the_probabilities() -> None:
    vocab, draws = 12, 6000
    logits = torch.linspace(-1, 2, vocab).repeat(draws, 1)
    step = SamplingStep(vocab, [SamplingValues(temperature=0.8, seed=99)], torch.device("cpu"))
    step.columns = np.repeat(step.columns, draws, axis=0)
    step.columns[:, Column.POSITION] = np.arange(draws)
    counts = np.bincount(step.by_torch(logits).tokens.numpy(), minlength=vocab)
    expected = draws * torch.softmax(logits[0].double() / 0.8, 0).numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 31.3  # exceeded by one of a thousand seeds; this one is fixed


def test_no_rows() -> None:
    step = SamplingStep(VOCAB, [SamplingValues()], DEVICE)
    step.columns = step.columns[:0]
    assert step.by_torch(torch.empty(0, VOCAB)).tokens.shape == (0,)


# Triton, compiled


@pytest.mark.gpu
@pytest.mark.parametrize("flat", [False, True])
def test_large_vocabulary_on_cuda(flat: bool) -> None:
    vocab, mix = 151_669, MIX * 4
    mix = [
        SamplingValues(**{**{name: getattr(values, name) for name in values.__slots__}, "seed": seed})
        for seed, values in enumerate(mix)
    ]
    step, logits = SamplingStep(vocab, mix, DEVICE), torch.randn(len(mix), vocab) * (0.5 if flat else 4.0)
    asks_top = [row for row, values in enumerate(mix) if values.logprobs]
    assert_same(step.by_kernels(logits), step.by_torch(logits), asks_top=asks_top)


@pytest.mark.gpu
def test_a_graph_replays_what_eager_launches_draw() -> None:
    vocab, steps = 5000, 6
    step = SamplingStep(vocab, [*MIX, SamplingValues()], DEVICE)
    step.columns[-1] = filler_columns(len(step.values))
    logits = 3 * torch.randn(steps, len(step.values), vocab, device=DEVICE)
    tokens: list[list[list[int]]] = []
    for graphed in (False, True):
        sampler, last = step.sampler(), torch.zeros(len(step.values) + 1, dtype=torch.int32, device=DEVICE)
        columns, held = torch.from_numpy(step.columns).to(DEVICE), torch.empty_like(logits[0])
        sampler.prepare(step.features)
        held.copy_(logits[0])
        graph = torch.cuda.CUDAGraph()
        if graphed:
            sampler.sample(
                held, columns[-1:].repeat(len(columns), 1), step.features, last
            )  # compiles; draws for fillers
            with torch.cuda.graph(graph):
                drawn = sampler.sample(held, columns, step.features, last)
        tokens.append([])
        for index in range(steps):
            held.copy_(logits[index])
            columns[:, Column.POSITION] = 40 + index
            if graphed:
                graph.replay()
            else:
                drawn = sampler.sample(held, columns, step.features, last)
            tokens[-1].append(drawn.tokens.tolist())
            assert last[: len(step.values) - 1].tolist() == drawn.tokens[:-1].tolist()
    assert tokens[0] == tokens[1]
