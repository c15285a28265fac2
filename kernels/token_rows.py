"""Rows of the token embedding and of the head that adapters have for some tokens, instead of the base model's.

The rows of all slots are in one table, in pages of PAGE rows, so that slots with few rows take little memory. A slot's
rows are ordered by token id: its i-th row is in place `i % PAGE` of its page `i // PAGE`. A row is complete: what LoRA
adds to it is in it already.

Letters: T rows (tokens) of the batch, H hidden width, V vocabulary, S slots, P pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import precision_of
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.segments import Segment

PAGE: Final = 16
EMBEDDING_ROWS, HEAD_ROWS = range(2)  # uses of rows, as indices
_MOST_PROGRAMS = 128  # for a tile's logits; each computes blocks of a slot's rows in turn
_BLOCK_N = 32


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """The rows of all slots.

    Attributes:
        held: number of rows by use and slot, on the CPU.
    """

    rows: Tensor  # [P * PAGE, H]
    ids: Tensor  # int32 [P * PAGE]: the token of each row
    slots: Tensor  # int32 [S, 2, 1 + P]: number of rows of each slot by use, and their pages
    held: list[list[int]]

    def places(self, use: int, slot: int) -> Tensor:
        """Return the places of a slot's rows in the table, int64 [count], in the order of their tokens."""
        count = self.held[use][slot]
        pages = self.slots[slot, use, 1 : 1 + pages_for(count)].long()
        return (pages[:, None] * PAGE + torch.arange(PAGE, device=pages.device)).view(-1)[:count]


def pages_for(rows: int) -> int:
    """Return the number of pages that hold these rows."""
    return -(-rows // PAGE)


@triton.jit
def _place(pages, index, inside, PAGE: tl.constexpr):
    page = tl.load(pages + index // PAGE, mask=inside, other=0)
    return page.to(tl.int64) * PAGE + index % PAGE


@triton.jit(do_not_specialize_on_alignment=["tiles", "tokens"])
def replace_embeddings_kernel(
    tokens, y, rows, ids, slots, tiles, y_stride, slot_stride, H,
    PAGE: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    pages = slots + slot.to(tl.int64) * slot_stride + 1
    count = tl.load(pages - 1)
    if (start >= stop) | (count == 0):
        return
    t = start + tl.arange(0, BLOCK_M)
    token = tl.load(tokens + t, mask=t < stop, other=-1)
    low = tl.zeros([BLOCK_M], tl.int32)
    high = low + count
    for _ in range(STEPS):
        is_open = low < high
        middle = (low + high) // 2
        is_less = tl.load(ids + _place(pages, middle, is_open, PAGE), mask=is_open, other=0) < token
        low = tl.where(is_open & is_less, middle + 1, low)
        high = tl.where(is_open & (is_less == 0), middle, high)
    inside = low < count
    place = _place(pages, low, inside, PAGE)
    found = inside & (tl.load(ids + place, mask=inside, other=-1) == token)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = found[:, None] & (columns < H)[None, :]
    value = tl.load(rows + place[:, None] * H + columns[None, :], mask=mask, other=0.0)
    tl.store(y + t.to(tl.int64)[:, None] * y_stride + columns[None, :], value, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def replace_logits_kernel(
    x, y, rows, ids, slots, tiles, x_stride, y_stride, slot_stride, H,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if start >= stop:
        return
    pages = slots + slot.to(tl.int64) * slot_stride + 1
    count = tl.load(pages - 1)
    t = start + tl.arange(0, BLOCK_M)
    in_rows = (t < stop)[:, None]
    x_at = x + t.to(tl.int64)[:, None] * x_stride
    for first in range(tl.program_id(1) * BLOCK_N, count, tl.num_programs(1) * BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        place = _place(pages, n, n < count, PAGE)
        token = tl.load(ids + place, mask=n < count, other=0)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, H, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            states = tl.load(x_at + k[None, :], mask=in_rows & (k < H)[None, :], other=0.0)
            weight = tl.load(
                rows + place[None, :] * H + k[:, None], mask=(n < count)[None, :] & (k < H)[:, None], other=0.0
            )
            total += tl.dot(states, weight, input_precision=PRECISION)
        at = y + t.to(tl.int64)[:, None] * y_stride + token[None, :]
        tl.store(at, total, mask=in_rows & (n < count)[None, :])


def replace_embeddings(
    tokens: Tensor,  # int32 [T]
    y: Tensor,  # [T, H], written
    own: TokenRows,
    segments: Sequence[Segment],
    tiles: Sequence[RowTiles] = (),
) -> None:
    """Replace the embeddings of tokens for which their row's adapter has a row of its own.

    Args:
        tiles: those of the segments on the device, for the kernel; without any, torch computes.
    """
    if not tiles:
        for segment in segments:
            if own.held[EMBEDDING_ROWS][segment.slot]:
                part = slice(segment.start, segment.stop)
                _replace_segment(tokens[part], y[part], own, own.places(EMBEDDING_ROWS, segment.slot))
        return
    width = y.shape[1]
    block_n = min(256, triton.next_power_of_2(width))
    for each in tiles:
        assert each.on_device is not None
        replace_embeddings_kernel[(len(each.table), triton.cdiv(width, block_n))](
            tokens, y, own.rows, own.ids, own.slots[:, EMBEDDING_ROWS], each.on_device[0], y.stride(0),
            own.slots.stride(0), width, PAGE=PAGE, STEPS=len(own.ids).bit_length(), BLOCK_M=each.height,
            BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip


def _replace_segment(tokens: Tensor, y: Tensor, own: TokenRows, places: Tensor) -> None:
    ids = own.ids[places]
    nearest = torch.searchsorted(ids, tokens).clamp_(max=len(ids) - 1)
    rows = own.rows[places[nearest]]
    y.copy_(torch.where((ids[nearest] == tokens)[:, None], rows, y))


def replace_logits(
    x: Tensor,  # [T, H]
    y: Tensor,  # float32 [T, V], written
    own: TokenRows,
    segments: Sequence[Segment],
    tiles: Sequence[RowTiles] = (),
) -> None:
    """Replace the logits of tokens for which their row's adapter has a row of its own.

    Args:
        tiles: as in `replace_embeddings`.
    """
    if not tiles:
        for segment in segments:
            if own.held[HEAD_ROWS][segment.slot]:
                part, places = slice(segment.start, segment.stop), own.places(HEAD_ROWS, segment.slot)
                y[part].index_copy_(1, own.ids[places].long(), x[part].float() @ own.rows[places].float().t())
        return
    programs = min(_MOST_PROGRAMS, triton.cdiv(len(own.ids), _BLOCK_N))
    for each in tiles:
        assert each.on_device is not None
        replace_logits_kernel[(len(each.table), programs)](
            x, y, own.rows, own.ids, own.slots[:, HEAD_ROWS], each.on_device[0], x.stride(0), y.stride(0),
            own.slots.stride(0), x.shape[1], PAGE=PAGE, BLOCK_M=each.height, BLOCK_N=_BLOCK_N, BLOCK_K=64,
            PRECISION=precision_of(own.rows), num_warps=4,
        )  # fmt: skip
