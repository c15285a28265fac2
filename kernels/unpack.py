"""Writes a whole slot in one launch: every matrix of its new adapter, and zeros everywhere else.

An adapter of 28 layers has hundreds of matrices. Copying them one by one takes ten times longer in Python than on the
device, and delays the batches that the same interpreter launches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ELEMENTS = 1 << 31  # a slot must have fewer: offsets are int32
_BLOCK, _PARTS, _WARPS = 2048, 8, 4


class Destination(NamedTuple):
    """A matrix of a slot, and the adapter's matrix to write there. All numbers count elements.

    Attributes:
        at: offset in the slot.
        rows, columns: of the slot's matrix, which is contiguous.
        source: offset in the adapter's flat buffer.
        source_rows, source_columns: of the adapter's matrix; 0 if it has none. The rest is filled with zeros.
        row_stride, column_stride: of the adapter's matrix.
    """

    at: int
    rows: int
    columns: int
    source: int = 0
    source_rows: int = 0
    source_columns: int = 0
    row_stride: int = 0
    column_stride: int = 1


@triton.jit
def unpack_kernel(flat, slot, destinations, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    destination = destinations + tl.program_id(0) * 8
    at, rows, columns = tl.load(destination), tl.load(destination + 1), tl.load(destination + 2)
    source, source_rows, source_columns = tl.load(destination + 3), tl.load(destination + 4), tl.load(destination + 5)
    row_stride, column_stride = tl.load(destination + 6), tl.load(destination + 7)
    size = rows * columns
    for first in range(tl.program_id(1) * BLOCK, size, PARTS * BLOCK):
        element = first + tl.arange(0, BLOCK)
        i, j = element // columns, element % columns
        known = (element < size) & (i < source_rows) & (j < source_columns)
        value = tl.load(flat + source + i * row_stride + j * column_stride, mask=known, other=0.0)
        tl.store(slot + at + element, value, mask=element < size)


def table(destinations: Sequence[Destination], device: torch.device) -> Tensor:
    """Copy destinations to the device, as int32 [destinations, 8].

    Raises:
        ValueError: the slot has `MOST_ELEMENTS` or more.
    """
    if max(one.at + one.rows * one.columns for one in destinations) >= MOST_ELEMENTS:
        raise ValueError("slot: expected fewer than 2^31 elements, because offsets are int32")
    return torch.tensor(destinations, dtype=torch.int32).to(device)


def unpack(
    flat: Tensor,  # [elements], the adapter's matrices; dtype and device of the slot
    slot: Tensor,  # [elements], contiguous
    destinations: Tensor,  # int32 [destinations, 8], from `table`
) -> None:
    """Write an adapter's matrices into a slot. Overwrites every destination; the rest of the slot is kept.

    Semantics: `slot[at + i * columns + j] = flat[source + i * row_stride + j * column_stride]` inside the adapter's
    matrix, 0 outside of it.
    """
    grid = (destinations.shape[0], _PARTS)
    unpack_kernel[grid](flat, slot, destinations, PARTS=_PARTS, BLOCK=_BLOCK, num_warps=_WARPS)
