"""The tokens that top_k, top_p and min_p keep: torch against sorting in float64, Triton's draws against torch's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranklet.kernels.sampling_row import Column
from ranklet.kernels.truncate import truncated
from ranklet.replicas.model.sampling_values import SamplingValues
from tests.kernels.sampling import SamplingStep, assert_same, kept64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WANTS: list[dict[str, float]] = [
    {"top_k": 2}, {"top_k": 20}, {"top_k": 700}, {"top_k": 10_000}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.999},
    {"min_p": 0.1}, {"min_p": 0.0001}, {"min_p": 1.0}, {"top_k": 30, "top_p": 0.7}, {"top_k": 600, "top_p": 0.9},
    {"top_p": 0.8, "min_p": 0.01}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}, {"top_k": 650, "min_p": 1e-6},
]  # fmt: skip
FLAT_WANTS: list[dict[str, float]] = [{"top_k": 5000}, {"top_p": 0.9}, {"min_p": 0.5}]


def kept(logits: Tensor, values: SamplingValues) -> set[int]:
    found = truncated(logits[None], torch.from_numpy(values.columns(0))[None])
    return set((found[0] > -torch.inf).nonzero().flatten().tolist())


def values_of(want: dict[str, float], seed: int = 0) -> SamplingValues:
    return SamplingValues(temperature=1.0, seed=seed, **want)  # type: ignore[arg-type]


@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_torch_keeps_what_sorting_in_float64_keeps(want: dict[str, float], spread: float) -> None:
    logits, values = spread * torch.randn(800), values_of(want)
    expected = kept64(logits.double().numpy(), values)
    # A sum in float32 may fall on the other side of top_p than one in float64: by one token at most.
    assert len(kept(logits, values) ^ expected) <= (1 if "top_p" in want or "min_p" in want else 0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_ties_keep_exactly_k_tokens_with_the_lower_ids(levels: list[int], top_k: int) -> None:
    logits = torch.tensor(levels, dtype=torch.float32)
    order = sorted(range(len(levels)), key=lambda token: (-levels[token], token))
    if top_k > 1:  # top_k 1 is greedy and does not come here
        assert kept(logits, values_of({"top_k": top_k})) == set(order[:top_k])


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.sampled_from([0.05, 0.3, 0.77, 0.95]))
def test_top_p_keeps_the_fewest_tokens_with_that_mass(levels: list[int], top_p: float) -> None:
    logits = torch.tensor(levels, dtype=torch.float32)
    mass = torch.softmax(logits.double(), 0)
    found = kept(logits, values_of({"top_p": top_p}))
    order = sorted(range(len(levels)), key=lambda token: (-levels[token], token))
    assert found == set(order[: len(found)])
    assert sum(mass[token].item() for token in found) >= top_p - 1e-6
    assert sum(mass[token].item() for token in order[: len(found) - 1]) < top_p + 1e-6


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_kernels_draw_from_the_same_tokens(spread: float) -> None:
    wants = [values_of(want, seed) for seed, want in enumerate(WANTS)]
    step, logits = SamplingStep(801, wants, DEVICE), spread * torch.randn(len(wants), 801)
    for position in range(2):
        step.columns[:, Column.POSITION] = position
        assert_same(step.by_kernels(logits), step.by_torch(logits))


@settings(max_examples=8)
@given(st.integers(0, 1 << 30), st.integers(1, 6))
def test_kernels_keep_ties_as_torch_does(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    wants = [values_of(WANTS[at], seed + at) for at in (0, 1, 5, 10, 13)]
    step = SamplingStep(150, wants, DEVICE)
    logits = torch.from_numpy(rng.integers(0, levels, (len(wants), 150)).astype(np.float32))
    assert_same(step.by_kernels(logits), step.by_torch(logits))


def test_top_p_is_a_share_of_what_top_k_keeps() -> None:
    wants = [values_of({"top_k": 2, "top_p": 0.2}, seed) for seed in range(8)]
    step, logits = SamplingStep(600, wants, DEVICE), 0.1 * torch.randn(8, 600)
    logits[:, [62, 293]] = torch.tensor([0.52, 0.5])  # of two groups, so that there are exactly two candidates
    for drawn in (step.by_kernels(logits), step.by_torch(logits)):
        assert drawn.tokens.tolist() == [62] * 8


def test_few_finite_logits() -> None:
    wants = [values_of(want, seed) for seed, want in enumerate(WANTS)]
    step, logits = SamplingStep(500, wants, DEVICE), torch.full((len(wants), 500), -torch.inf)
    logits[:, 17::161] = torch.randn(len(wants), 3)
    assert_same(step.by_kernels(logits), step.by_torch(logits))


def test_more_candidates_than_the_kernel_gathers() -> None:
    vocab = 3 * 4096
    wants = [values_of(want, seed) for seed, want in enumerate(FLAT_WANTS)]
    step, logits = SamplingStep(vocab, wants, DEVICE), torch.zeros(len(wants), vocab)
    assert_same(step.by_kernels(logits), step.by_torch(logits))
    logits = 0.1 * torch.randn(len(wants), vocab)
    assert_same(step.by_kernels(logits), step.by_torch(logits))


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5, 4.0])
def test_large_vocabulary_on_cuda(spread: float) -> None:
    wants = [values_of(want, seed) for seed, want in enumerate(WANTS * 2)]
    step = SamplingStep(151_669, wants, DEVICE)
    logits = spread * torch.randn(len(wants), 151_669)
    found, expected = step.by_kernels(logits).tokens, step.by_torch(logits).tokens
    # Sums of 151,669 weights end at another token than the CPU's where the next token adds less than rounding does.
    assert (found.cpu() != expected).sum() <= (1 if spread else 0)
