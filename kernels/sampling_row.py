"""Sampling values of a row of logits, as int32 columns that travel with a step. Imports no torch.

Floats travel as their bits. Letters: N rows of logits.
"""

from enum import IntEnum, IntFlag
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

TOP_LOGPROBS: Final = 20  # most ids and logprobs that a row may ask for
ROW_WIDTH: Final = 16  # columns of a row
PIECE: Final = 4096  # tokens of the vocabulary that one program scans


class Feature(IntFlag):
    """Work that a row, or any row of a step, asks of the sampler. Part of the key of a CUDA graph."""

    NOISE = 1  # temperature above 0
    TRUNCATE = 2  # top_k, top_p or min_p
    PENALIZE = 4  # presence, frequency or repetition penalty
    EDIT = 8  # logit_bias, or bans until min_tokens
    MASK = 16  # allowed_token_ids
    LOGPROB = 32  # logprob of the drawn token
    TOP = 64  # the largest logprobs, always together with LOGPROB


class Column(IntEnum):
    FLAGS = 0  # Feature of the row
    ROW = 1  # row of the state: counts, edits, mask
    POSITION = 2  # index in the sequence of the token that is drawn
    SCALE = 3  # float: 1 / temperature; 1 if the row is greedy
    TOP_K = 4  # 0: all
    TOP_P = 5  # float; 1: all
    MIN_P = 6  # float: log(min_p); -inf: all
    PRESENCE = 7  # float
    FREQUENCY = 8  # float
    REPETITION = 9  # float: factor of negative logits
    PARDON = 10  # float: 1 / repetition penalty, factor of positive logits
    SEED_LOW = 11
    SEED_HIGH = 12
    EDITS = 13  # number of edited tokens
    PIECES_LOW = 14  # bit p: piece p has an edited token; bit 63 stands for all pieces from 63 on
    PIECES_HIGH = 15


CHANGING: Final = Feature.PENALIZE | Feature.EDIT | Feature.MASK  # the row draws from changed logits
_ALL = Feature.NOISE | Feature.TRUNCATE | CHANGING
_LOGPROBS = Feature.LOGPROB | Feature.TOP
_LEVELS = (Feature.NOISE | Feature.TRUNCATE, _ALL)


def features_of(columns: NDArray[np.int32]) -> Feature:
    """Return the features that any of the rows [N, ROW_WIDTH] asks for."""
    return Feature(int(np.bitwise_or.reduce(columns[:, Column.FLAGS], initial=0)))


@cache
def rounded(features: Feature) -> Feature:
    """Return the smallest of four supersets, so that steps share CUDA graphs. Any superset gives the same tokens.

    Greedy steps are not a set of their own: looking at the flags of each row costs them 3 us.
    """
    level = next(level for level in _LEVELS if features & ~_LOGPROBS in level)
    return level | (_LOGPROBS if features & _LOGPROBS else Feature(0))
