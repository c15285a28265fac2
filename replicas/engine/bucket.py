"""Rounds the sizes of steps up to buckets, so that one CUDA graph serves many steps.

Sizes are as coarse as the cost of padding allows, because every further size needs graphs of its own.
`tests/replicas/engine/test_bucket.py` counts the buckets of random steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ranklet.kernels.powers import power_of_four, power_of_two
from ranklet.replicas.model.cudnn_attention import MIN_LONGEST

_MIN_TOKENS = 16
_COARSE_STEP = 2048  # the same, for steps with pieces of prompts
_LEAST_STEP = 64  # tokens; smaller steps with prompts take about as long
_FEW_ROWS = 16
_TILE_ROWS = 64
_WIDTHS = (16, 64)  # pages
_SMALL_TABLE = 16_384  # entries of a page table that are copied in a few microseconds
_COARSE_TOKENS = 1024  # up to here, a replay saves more time than a quarter of the tokens costs
_FINE_TOKENS = 8192  # from here on, a sixteenth of the tokens costs more time than a replay saves
_FULL = 31 / 32  # of the largest step: nothing else fits into most of these


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of a padded step.

    Padding adds less than a quarter of the step's tokens, or less than 16 tokens if that is more. The quarter becomes
    an eighth above 1024 tokens and a sixteenth above 8192. A step that is nearly full is padded to the largest step.
    """

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], max_tokens: int) -> "Bucket":
        asked, longest = sum(lengths), power_of_two(max(*lengths, MIN_LONGEST))
        tokens = rounded_tokens(asked, max_tokens)
        fillers = -(-(tokens - asked) // longest)
        return cls(tokens, 2 * power_of_four(-(-(len(lengths) + fillers) // 2)), longest)

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Append fillers that take the remaining tokens, then empty sequences."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        fillers = (self.longest,) * whole + (rest,) * (rest > 0)
        return (*lengths, *fillers, *(0,) * (self.sequences - len(lengths) - len(fillers)))


def is_full(tokens: int, max_tokens: int) -> bool:
    """Whether a step of this size is padded to the largest step."""
    return max_tokens * _FULL <= tokens <= max_tokens


def rounded_tokens(tokens: int, max_tokens: int) -> int:
    return max_tokens if is_full(tokens, max_tokens) else _rounded(tokens)


def rounded_step(tokens: int, max_tokens: int) -> int:
    """Round the tokens of a step with pieces of prompts up. Its size is coarser, because more else differs."""
    if tokens > _FINE_TOKENS:
        return rounded_tokens(tokens, max_tokens)
    parts = 8 if _COARSE_TOKENS < tokens <= _COARSE_STEP else 4
    step = max(_LEAST_STEP, power_of_two(tokens) // parts)
    return min(-(-tokens // step) * step, max(max_tokens, _LEAST_STEP))


def rounded_rows(rows: int) -> int:
    """Round a number of decodes up, to few sizes, because graphs of each are captured before requests come.

    A power of four up to 16. Behind it 16 times the products of up to 64 rows cost the same, and a filler costs some
    microseconds in the language-model head.
    """
    if rows <= _FEW_ROWS:
        return power_of_four(rows)
    step = max(_FEW_ROWS if rows <= _TILE_ROWS else 2 * _FEW_ROWS, power_of_two(rows) // 8)
    return -(-rows // step) * step


def rounded_pages(rows: int, pages: int, most: int) -> int:
    """Round the pages of the longest of some decodes up to the width of their page table.

    Steps with prompts have tables of `most` pages: their size matters less there, and they have fewer sizes.

    Args:
        rows: of the table.
        most: pages of the longest sequence that is possible.
    """
    if rows * most <= _SMALL_TABLE:
        return most
    return next((width for width in _WIDTHS if pages <= width < most), most)


def _rounded(tokens: int) -> int:
    # Four sizes between two powers of two; eight or sixteen for large steps.
    finer = 3 if tokens <= _COARSE_TOKENS else 4 if tokens <= _FINE_TOKENS else 5
    step = max(_MIN_TOKENS, 1 << max(tokens.bit_length() - finer, 0))
    return -(-tokens // step) * step
