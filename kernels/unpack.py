"""A slot written in one launch: every matrix of its new tenant where it belongs, zeros everywhere else.

An adapter of 28 layers has hundreds of matrices. Copied one by one they cost Python, which launches batches meanwhile,
ten times as long as the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ELEMENTS = 1 << 31  # of a slot: offsets are int32
_BLOCK, _PARTS, _WARPS = 2048, 8, 4


class Destination(NamedTuple):
    """A matrix of a slot, and where its tenant's stands in the flat buffer that it comes in. Numbers of elements."""

    at: int  # in the slot
    rows: int
    columns: int
    source: int = 0
    source_rows: int = 0  # 0: the tenant has none, zeros are written
    source_columns: int = 0
    row_stride: int = 0
    column_stride: int = 1


@triton.jit
def _unpack_kernel(flat, slot, rooms, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    room = rooms + tl.program_id(0) * 8
    at, rows, columns = tl.load(room), tl.load(room + 1), tl.load(room + 2)
    source, source_rows, source_columns = tl.load(room + 3), tl.load(room + 4), tl.load(room + 5)
    row_stride, column_stride = tl.load(room + 6), tl.load(room + 7)
    size = rows * columns
    for first in range(tl.program_id(1) * BLOCK, size, PARTS * BLOCK):
        element = first + tl.arange(0, BLOCK)
        i, j = element // columns, element % columns
        known = (element < size) & (i < source_rows) & (j < source_columns)
        value = tl.load(flat + source + i * row_stride + j * column_stride, mask=known, other=0.0)
        tl.store(slot + at + element, value, mask=element < size)


def table(rooms: Sequence[Destination], device: torch.device) -> Tensor:
    """The rooms as the kernel reads them: int32 [rooms, 8].

    Raises:
        ValueError: the slot has `MOST_ELEMENTS` or more.
    """
    if max(room.at + room.rows * room.columns for room in rooms) >= MOST_ELEMENTS:
        raise ValueError("a slot of 2^31 elements or more: its offsets do not fit int32")
    return torch.tensor(rooms, dtype=torch.int32).to(device)


def unpack(flat: Tensor, slot: Tensor, rooms: Tensor) -> None:
    """Write a slot; what no room covers stays as it is.

    Args:
        flat: the tenant's matrices, one run; of the slot's dtype, on its device.
        slot: one run of memory.
        rooms: from `table`.
    """
    _unpack_kernel[(rooms.shape[0], _PARTS)](flat, slot, rooms, PARTS=_PARTS, BLOCK=_BLOCK, num_warps=_WARPS)
