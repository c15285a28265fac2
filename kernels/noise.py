"""Gumbel noise as a function of (seed, position, token id): the same in every batch, on every device.

The bits are those of Philox4x32-7 (Salmon et al., 2011; seven rounds pass BigCrush) with the seed as the key and
(token id // 4, position, 0, 0) as the counter; the token takes word `token id % 4`. The bits are exact on every device.
The noise itself differs by up to 1e-5 between CUDA, which computes fast logarithms, and the CPU.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

ROUNDS: Final = 7
_ROUNDS = tl.constexpr(ROUNDS)
_MASK = 0xFFFFFFFF


@triton.jit
def seed_of(low, high):
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _log(x, FAST: tl.constexpr):
    return libdevice.fast_logf(x) if FAST else tl.log(x)  # Triton's interpreter has no functions of CUDA


@triton.jit
def gumbel_of(bits, FAST: tl.constexpr):
    # Small v, which give the largest noise, keep all their digits: a draw among many tokens has no ties.
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * (0.2 + v * 0.16666667)))))
    return -_log(tl.where(v < 0.0625, series, -_log(1.0 - v, FAST)), FAST)


@triton.jit
def gumbel_run(seed, position, first, COUNT: tl.constexpr, FAST: tl.constexpr):
    """Return the noise of COUNT tokens from `first` on; both are multiples of 4."""
    counters = first // 4 + tl.arange(0, COUNT // 4)
    zeros = tl.zeros([COUNT // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counters, zeros + position, zeros, zeros, _ROUNDS)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return gumbel_of(bits, FAST)


@triton.jit
def gumbel_at(seed, position, tokens, FAST: tl.constexpr):
    """Return the noise of any block of token ids."""
    zeros = tokens * 0
    w0, w1, w2, w3 = tl.philox(seed, tokens // 4, zeros + position, zeros, zeros, _ROUNDS)
    word = tokens % 4
    return gumbel_of(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)), FAST)


def philox(seeds: Tensor, counters: tuple[Tensor, Tensor], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32, int64 tensors in [0, 2**32).

    Args:
        seeds: int64, any bits.
        counters: the lower two words of the counter, broadcast against `seeds`.
    """
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    zeros = torch.zeros_like(seeds + counters[0] + counters[1])
    c0, c1, c2, c3 = (counters[0] & _MASK) + zeros, (counters[1] & _MASK) + zeros, zeros, zeros
    for _ in range(rounds):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the upper words survive the overflow of int64
        c0, c2 = ((odd >> 32) & _MASK) ^ c1 ^ low, ((even >> 32) & _MASK) ^ c3 ^ high
        c1, c3 = odd & _MASK, even & _MASK
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel(
    seeds: Tensor,  # int64 [N]
    positions: Tensor,  # [N]
    vocab: int,
) -> Tensor:
    """Return the noise of all tokens at one position of each sequence, float32 [N, vocab]. The kernels' twin."""
    counters = torch.arange(-(-vocab // 4), device=seeds.device)
    words = philox(seeds[:, None], (counters, positions[:, None].long()))
    bits = torch.stack(words, dim=2).flatten(1)[:, :vocab]
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.where(v < 0.0625, -torch.log1p(-v), -torch.log(1 - v)).log()
