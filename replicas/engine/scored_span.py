"""Tokens of a prompt in a step whose logprobs are asked for."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ScoredSpan(NamedTuple):
    """Tokens whose logprobs are computed from consecutive hidden states.

    Attributes:
        item: the item of the step that the tokens belong to.
        first: packed token whose state gives the first logprob.
        start: index of the first scored token in its sequence.
        tokens: int32 [scored].
        top: number of best alternatives to each token.
    """

    item: int
    first: int
    start: int
    tokens: NDArray[np.int32]
    top: int
