"""Batches rounded up, so that one CUDA graph serves many: tokens and prompts that nobody asked for fill the rest.

Each number of a bucket multiplies the graphs, so steps are as coarse as padding allows: `tests/replicas/test_bucket.py`
counts the shapes of random batches. Letters: T tokens, B prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ranklet.kernels.batch import power_of_four, power_of_two
from ranklet.replicas.ragged import LEAST_LONGEST

_LEAST_TOKENS = 16
_COARSE_TOKENS = 1024  # up to so many, a replay saves more than a quarter of the tokens costs


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a padded batch has: from 64 tokens on at most a quarter more than were asked for, from 1024 on an eighth."""

    tokens: int
    prompts: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Bucket":
        """The bucket of prompts of these lengths, each at least 1."""
        asked, longest = sum(lengths), power_of_two(max(*lengths, LEAST_LONGEST))
        tokens = _rounded(asked)
        fillers = -(-(tokens - asked) // longest)
        return cls(tokens, 2 * power_of_four(-(-(len(lengths) + fillers) // 2)), longest)

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Lengths of all prompts: those asked for, some that take the other tokens, and empty ones."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        fillers = (self.longest,) * whole + (rest,) * (rest > 0)
        return (*lengths, *fillers, *(0,) * (self.prompts - len(lengths) - len(fillers)))


def _rounded(tokens: int) -> int:
    """Up to the next of four steps between powers of two, of eight for many."""
    finer = 3 if tokens <= _COARSE_TOKENS else 4
    step = max(_LEAST_TOKENS, 1 << max(tokens.bit_length() - finer, 0))
    return -(-tokens // step) * step
