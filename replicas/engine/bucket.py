"""Batches rounded up, so that one CUDA graph serves many: tokens and prompts that nobody asked for fill the rest.

Each number of a bucket multiplies the graphs, so steps are as coarse as padding allows: `tests/replicas/test_bucket.py`
counts the shapes of random batches. Letters: T tokens, B prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ranklet.kernels.powers import power_of_four, power_of_two
from ranklet.replicas.model.cudnn_attention import MIN_LONGEST

_LEAST_TOKENS = 16
_COARSE_TOKENS = 1024  # up to so many, a replay saves more than a quarter of the tokens costs
_FINE_TOKENS = 8192  # from so many on, a sixteenth of the tokens costs more than is saved
_FULL = 31 / 32  # of all that a batch may have: nothing else fits in most of those


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a padded batch has: at most a quarter more than was asked for from 64 tokens on, an eighth from 1024 on, a
    sixteenth from 8192 on. A batch that is as good as full has as many tokens as it may have.
    """

    tokens: int
    prompts: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], most: int) -> "Bucket":
        """The bucket of prompts of these lengths, each at least 1, where a batch has at most so many tokens."""
        asked, longest = sum(lengths), power_of_two(max(*lengths, MIN_LONGEST))
        tokens = most if is_full(asked, most) else _rounded(asked)
        fillers = -(-(tokens - asked) // longest)
        return cls(tokens, 2 * power_of_four(-(-(len(lengths) + fillers) // 2)), longest)

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Lengths of all prompts: those asked for, some that take the other tokens, and empty ones."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        fillers = (self.longest,) * whole + (rest,) * (rest > 0)
        return (*lengths, *fillers, *(0,) * (self.prompts - len(lengths) - len(fillers)))


def is_full(tokens: int, most: int) -> bool:
    """Whether a batch of so many tokens is rounded up to the most that there may be."""
    return most * _FULL <= tokens <= most


def _rounded(tokens: int) -> int:
    """Up to the next of four steps between powers of two, of eight or sixteen for many."""
    finer = 3 if tokens <= _COARSE_TOKENS else 4 if tokens <= _FINE_TOKENS else 5
    step = max(_LEAST_TOKENS, 1 << max(tokens.bit_length() - finer, 0))
    return -(-tokens // step) * step
