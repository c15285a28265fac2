"""Batches rounded up, so that one CUDA graph serves many: tokens and prompts that nobody asked for fill the rest.

Letters: T tokens, B prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ranklet.kernels.batch import power_of_two

_LEAST_LONGEST = 128
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a padded batch has: at most an eighth more tokens than were asked for, from 128 on."""

    tokens: int
    prompts: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Bucket":
        """The bucket of prompts of these lengths, each at least 1."""
        asked = sum(lengths)
        tokens = max(_LEAST_TOKENS, _rounded(asked))
        rest = tokens - asked
        return cls(
            tokens, power_of_two(len(lengths) + (rest > 0)), power_of_two(max(*lengths, rest, _LEAST_LONGEST))
        )  # fmt: skip

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Lengths of all prompts: those asked for, one that takes the other tokens, and empty ones."""
        rest = self.tokens - sum(lengths)
        filler = (rest,) if rest else ()
        return (*lengths, *filler, *(0,) * (self.prompts - len(lengths) - len(filler)))


def _rounded(tokens: int) -> int:
    """Up to the next of eight steps between powers of two."""
    step = max(_LEAST_TOKENS, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step
