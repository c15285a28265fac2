"""The numbers of sampling_row.py as constants of Triton, and how a kernel reads a row's columns."""

import triton
import triton.language as tl

from ranklet.kernels.sampling_row import CHANGING, ROW_WIDTH, TOP_LOGPROBS, Column, Feature

NOISE = tl.constexpr(int(Feature.NOISE))
TRUNCATE = tl.constexpr(int(Feature.TRUNCATE))
PENALIZE = tl.constexpr(int(Feature.PENALIZE))
EDIT = tl.constexpr(int(Feature.EDIT))
MASK = tl.constexpr(int(Feature.MASK))
LOGPROB = tl.constexpr(int(Feature.LOGPROB))
TOP = tl.constexpr(int(Feature.TOP))
CHANGE = tl.constexpr(int(CHANGING))
TOPS = tl.constexpr(TOP_LOGPROBS)

WIDTH = tl.constexpr(ROW_WIDTH)
FLAGS = tl.constexpr(int(Column.FLAGS))
ROW = tl.constexpr(int(Column.ROW))
POSITION = tl.constexpr(int(Column.POSITION))
SCALE = tl.constexpr(int(Column.SCALE))
TOP_K = tl.constexpr(int(Column.TOP_K))
TOP_P = tl.constexpr(int(Column.TOP_P))
MIN_P = tl.constexpr(int(Column.MIN_P))
PRESENCE = tl.constexpr(int(Column.PRESENCE))
FREQUENCY = tl.constexpr(int(Column.FREQUENCY))
REPETITION = tl.constexpr(int(Column.REPETITION))
PARDON = tl.constexpr(int(Column.PARDON))
SEED_LOW = tl.constexpr(int(Column.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Column.SEED_HIGH))
EDITS = tl.constexpr(int(Column.EDITS))
PIECES_LOW = tl.constexpr(int(Column.PIECES_LOW))
PIECES_HIGH = tl.constexpr(int(Column.PIECES_HIGH))


@triton.jit
def column_of(columns, row, COLUMN: tl.constexpr):
    return tl.load(columns + row * WIDTH + COLUMN)


@triton.jit
def float_of(columns, row, COLUMN: tl.constexpr):
    return tl.load(columns + row * WIDTH + COLUMN).to(tl.float32, bitcast=True)
