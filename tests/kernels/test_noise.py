"""Noise: known answers of Philox, the kernels against their twin, and the distribution."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ranklet.kernels.noise import gumbel, gumbel_at, gumbel_run, philox, seed_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def noise_kernel(seeds, position, runs, singles, first, COUNT: tl.constexpr, FAST: tl.constexpr):
    row = tl.program_id(0)
    seed = seed_of(tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1))
    lanes = tl.arange(0, COUNT)
    tl.store(runs + row * COUNT + lanes, gumbel_run(seed, tl.load(position + row), first, COUNT, FAST))
    tl.store(singles + row * COUNT + lanes, gumbel_at(seed, tl.load(position + row), first + lanes, FAST))


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (7, ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]),
        (10, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
    ],
)
def test_known_answers_of_random123(rounds: int, words: list[str]) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert [f"{int(word):08x}" for word in philox(zero, (zero, zero), rounds)] == words


def test_kernels_agree_with_torch() -> None:
    seeds = torch.tensor([0, 1, -1, 1 << 62, -123_456_789_012_345], dtype=torch.int64)
    positions = torch.tensor([0, 1, 32_767, 131_071, 5], dtype=torch.int32)
    first, count = 4096, 128
    runs, singles = torch.full((2, len(seeds), count), torch.nan, device=DEVICE)
    noise_kernel[(len(seeds),)](
        seeds.view(torch.int32).to(DEVICE), positions.to(DEVICE), runs, singles, first, COUNT=count,
        FAST=DEVICE.type == "cuda",
    )  # fmt: skip
    expected = gumbel(seeds, positions, first + count)[:, first:]
    assert torch.equal(runs, singles)
    torch.testing.assert_close(runs.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_every_bit_of_seed_and_position_matters() -> None:
    seeds = torch.tensor([0] + [1 << bit for bit in range(63)] + [-(1 << 63)], dtype=torch.int64)
    noise = gumbel(seeds, torch.zeros(len(seeds), dtype=torch.int32), 8)
    assert len(torch.unique(noise[:, 0])) == len(seeds)
    positions = torch.tensor([0] + [1 << bit for bit in range(20)], dtype=torch.int32)
    noise = gumbel(torch.zeros(len(positions), dtype=torch.int64), positions, 8)
    assert len(torch.unique(noise[:, 3])) == len(positions)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(torch.tensor([11, 12]), torch.tensor([3, 4]), 200_000).double().flatten()
    # The inverse of the distribution function makes it uniform; a hundred bins of equal probability.
    counts = np.histogram(torch.exp(-torch.exp(-noise)).numpy(), bins=100, range=(0, 1))[0]
    expected = len(noise) / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * math.sqrt(2 * 99)
    tail = torch.tensor([(noise > bound).double().mean() / -math.expm1(-math.exp(-bound)) for bound in (5.0, 7.0, 9.0)])
    assert ((tail - 1).abs() < torch.tensor([0.1, 0.2, 0.4])).all()


def test_neighbouring_tokens_positions_and_seeds_are_independent() -> None:
    noise = gumbel(torch.tensor([7, 7, 8]), torch.tensor([1, 2, 1]), 100_000).double()
    pairs = torch.stack([noise[0, :-1], noise[0, 1:], noise[1, :-1], noise[2, :-1]])
    correlation = torch.corrcoef(pairs) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.015


def test_the_likeliest_draw_has_no_ties() -> None:
    noise = gumbel(torch.arange(50), torch.zeros(50, dtype=torch.int32), 100_000)
    best = noise.topk(2, dim=1).values
    assert (best[:, 0] > best[:, 1]).all()
    assert torch.isfinite(noise).all()
