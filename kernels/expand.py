"""The second half of LoRA for every adapter of a batch in one launch: adds `B h` to the base model's output.

Letters as in `stack.py`; T rows (tokens) of the batch. After SGLang's csgmv and Punica's SGMV.
"""

import triton
import triton.language as tl
from torch import Tensor

from ranklet.kernels.launch import launch_fitted, precision_of, programs_of, slice_of, widths_of
from ranklet.kernels.row_tiles import RowTiles
from ranklet.kernels.stack import LinearStack
from ranklet.kernels.tiles import ExpandTile


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=["tiles", "terms"])
def expand_kernel(
    h, b, y, out, tiles, ranks, terms, meta_stride, h_stride, h_split_stride, b_slot_stride, terms_stride, y_stride,
    first_row, N,
    R: tl.constexpr, SLICES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, LOOP: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr, MOVED: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start = tl.load(tiles + tile * 3)
    stop = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if start >= stop:
        return
    piece, first, width, program = slice_of(tl.program_id(1), SLICES, W0, W1, W2, BLOCK_N * LOOP)
    rank = tl.load(ranks + slot * meta_stride + piece)
    if rank == 0 and not MOVED and not TERMS:
        return
    rows = start + tl.arange(0, BLOCK_M)
    in_rows = (rows < stop)[:, None]
    r = tl.arange(0, BLOCK_R)
    in_rank = (r < rank)[:, None]
    b_at = b + slot.to(tl.int64) * b_slot_stride + r[:, None]
    columns = program * LOOP * BLOCK_N + tl.arange(0, BLOCK_N)
    if LOOP == 1:
        fetched = tl.load(b_at + (first + columns)[None, :] * R, mask=(columns < width)[None, :] & in_rank, other=0.0)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    h_at = h + rows.to(tl.int64)[:, None] * h_stride + piece * R + r[None, :]
    in_h = in_rows & (r < rank)[None, :]
    hidden = tl.load(h_at, mask=in_h, other=0.0)
    for part in tl.static_range(1, SPLIT):
        hidden += tl.load(h_at + part * h_split_stride, mask=in_h, other=0.0)
    hidden = hidden.to(b.dtype.element_ty)
    for j in tl.range(0, LOOP, num_stages=STAGES):
        columns = (program * LOOP + j) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_columns = (columns < width)[None, :]
        if LOOP == 1:
            weight = fetched
        else:
            weight = tl.load(b_at + (first + columns)[None, :] * R, mask=in_columns & in_rank, other=0.0)
        at = (rows - first_row).to(tl.int64)[:, None] * y_stride + (first + columns)[None, :]
        before = tl.load(y + at, mask=in_rows & in_columns, other=0.0)
        after = tl.dot(hidden, weight, input_precision=PRECISION) + before.to(tl.float32)
        if TERMS:
            terms_at = terms + slot.to(tl.int64) * terms_stride + (first + columns)[None, :]
            after = after * tl.load(terms_at, mask=in_columns, other=0.0)
            after += tl.load(terms_at + N, mask=in_columns, other=0.0)
        tl.store(out + at, after.to(out.dtype.element_ty), mask=in_rows & in_columns)


def expand(
    h: Tensor,  # [split, T, slices * R], as `shrink` wrote it
    y: Tensor,  # [T - first_row, N], the batch's rows from `first_row` on
    stack: LinearStack,
    tiles: RowTiles,
    tile: ExpandTile,
    *,
    out: Tensor | None = None,  # [T - first_row, N], of any dtype
    terms: Tensor | None = None,  # float32 [S, 2, N]
    first_row: int = 0,
    chained: bool = False,
) -> None:
    """Add the adapters' output to the base model's, in float32 and with one rounding. In place, or into `out`.

    Semantics: `y[t, n] += sum over p, j of B[slot(t), n, j] h[p, t, i * R + j]`, where slice i holds column n; then,
    with `terms`, `y[t, n] = gain[slot(t), n] * y[t, n] + shift[slot(t), n]`. With
    `out`, `y` is kept and the sum is written to every row of a tile, also in slices that the adapter does not target.

    Args:
        chained: whether the launch right before this one is a `shrink` with `chained` that writes `h`.
    """
    assert tiles.on_device is not None
    table = tiles.on_device[0]
    moved = out is not None and out is not y
    block_n = min(tile.block_n, triton.next_power_of_2(max(stack.widths)))
    programs = programs_of(stack, block_n * tile.loop)
    block_r = triton.next_power_of_2(stack.rank)

    def launch(stages: int) -> None:
        expand_kernel[(len(tiles.table), programs)](
            h, stack.b, y, out if moved else y, table, stack.ranks, h if terms is None else terms,
            stack.ranks.stride(0), h.stride(1), h.stride(0), stack.b.stride(0), 0 if terms is None else terms.stride(0),
            y.stride(0), first_row, stack.b.shape[1], R=stack.rank, **widths_of(stack),
            BLOCK_M=tiles.height, BLOCK_R=block_r, BLOCK_N=block_n, LOOP=tile.loop, SPLIT=h.shape[0], STAGES=stages,
            PRECISION=precision_of(stack.b), CHAINED=chained, MOVED=moved, TERMS=terms is not None,
            num_warps=tile.warps, launch_pdl=chained, maxnreg=tile.registers or None,
        )  # fmt: skip

    variant = (expand_kernel, tile, tiles.height, block_r, h.shape[0], y.dtype, moved, terms is not None)
    launch_fitted(launch, tile.stages, variant)
