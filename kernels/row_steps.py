"""Steps that the products of short batches share: norm before, LoRA within, and what follows the product.

An RMS norm in front of a product costs no launch: the product reads `residual * norm weight` in 16 bits, and multiplies
its output by the row's `rsqrt(mean square)`. The product before has written the sums of squares, one per column tile.

Letters as in `stack.py`; T rows (tokens) of the batch. BLOCK_M rows and BLOCK_N columns of a program's tile.
"""

import triton
import triton.language as tl

PLAIN = 0  # out = the product
GATED = 1  # out = silu(gate) * up; the weight holds gate first
ADDED = 2  # residual += the product; out = residual * norm weight, and its sums of squares


@triton.jit
def weight_rows_of(first, N, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    # The rows of the weight for the columns from `first` on; for GATED, the rows of gate and then those of up.
    if KIND == 1:
        both = tl.arange(0, 2 * BLOCK_N)
        found = tl.where(both < BLOCK_N, first + both, N + first + both - BLOCK_N)
    else:
        found = first + tl.arange(0, BLOCK_N)
    return found


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))


@triton.jit
def row_scale(squares, rows, in_rows, eps, K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    parts = tl.arange(0, BLOCK)
    at = squares + rows[:, None] * PARTS + parts[None, :]
    found = tl.load(at, mask=in_rows[:, None] & (parts < PARTS)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(found, 1) / K + eps)


@triton.jit
def runs_in(runs, low_row, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr):
    # The first and end run with rows in a block. Runs are sorted; empty ones fill the table up.
    run = tl.arange(0, ADAPTERS)
    start = tl.load(runs + run * 3)
    stop = tl.load(runs + run * 3 + 1)
    used = stop > start
    before = tl.sum((used & (stop <= low_row)).to(tl.int32), 0)
    return before, tl.sum((used & (start < low_row + BLOCK_M)).to(tl.int32), 0)


@triton.jit
def run_group(
    b, runs, group, end_run, low_row, columns, b_slot_stride, R: tl.constexpr, BLOCK_R: tl.constexpr,
    RUNS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Returns the first and end row of RUNS runs side by side, one entry per rank, and B [columns, RUNS * BLOCK_R].
    inner = tl.arange(0, RUNS * BLOCK_R)
    r = inner % BLOCK_R
    run = group + inner // BLOCK_R
    live = (run < end_run) & (r < R)
    start = tl.load(runs + run * 3, mask=live, other=0)
    stop = tl.load(runs + run * 3 + 1, mask=live, other=0)
    slot = tl.load(runs + run * 3 + 2, mask=live, other=0).to(tl.int64)
    here = (start < low_row + BLOCK_M) & (stop > low_row)
    b_at = b + columns[:, None] * R + (slot * b_slot_stride + r)[None, :]
    return start, stop, tl.load(b_at, mask=here[None, :], other=0.0)


@triton.jit
def add_lora(
    acc, h, b, runs, start, stop, weight, first_run, end_run, rows, low_row, piece, columns, h_stride, b_slot_stride,
    R: tl.constexpr, BLOCK_R: tl.constexpr, RUNS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    # A run is consecutive rows that share an adapter. Adds `B h` of each run, RUNS of them in one product: a row's h
    # is zero for the other runs.
    # `start`, `stop` and `weight` are of the first group of runs.
    r = tl.arange(0, RUNS * BLOCK_R) % BLOCK_R
    h_at = h + rows[:, None] * h_stride + piece * R + r[None, :]
    if CHAINED:
        tl.extra.cuda.gdc_wait()  # h is the only tensor read here that the launch before has written
    own = (rows[:, None] >= start[None, :]) & (rows[:, None] < stop[None, :])
    hidden = tl.load(h_at, mask=own, other=0.0)
    acc = tl.dot(hidden, tl.trans(weight), acc, input_precision=PRECISION)
    for group in tl.range(first_run + RUNS, end_run, RUNS, num_stages=2):
        start, stop, weight = run_group(
            b, runs, group, end_run, low_row, columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
        )
        own = (rows[:, None] >= start[None, :]) & (rows[:, None] < stop[None, :])
        hidden = tl.load(h_at, mask=own, other=0.0)
        acc = tl.dot(hidden, tl.trans(weight), acc, input_precision=PRECISION)
    return acc


@triton.jit
def slots_of(runs, rows, ADAPTERS: tl.constexpr):
    # The slot of each row's adapter; -1 for rows of the base model.
    run = tl.arange(0, ADAPTERS)
    start, stop = tl.load(runs + run * 3), tl.load(runs + run * 3 + 1)
    own = (rows[:, None] >= start[None, :]) & (rows[:, None] < stop[None, :])
    return tl.sum(tl.where(own, tl.load(runs + run * 3 + 2)[None, :] + 1, 0), 1) - 1


@triton.jit
def with_terms(acc, terms, slots, terms_stride, columns, WIDTH: tl.constexpr):
    # gain * acc + shift, of each row's slot; WIDTH columns of the projection.
    at = terms + slots.to(tl.int64)[:, None] * terms_stride + columns[None, :]
    adapted = (slots >= 0)[:, None]
    gain = tl.load(at, mask=adapted, other=1.0)
    return acc * gain + tl.load(at + WIDTH, mask=adapted, other=0.0)


@triton.jit
def finish(
    acc, up, scale, before, rows, in_rows, columns, tile, N: tl.constexpr, bias, runs, terms, terms_stride, out,
    residual, norm, out_squares, OUT_PARTS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    TERMS: tl.constexpr, ADAPTERS: tl.constexpr, KIND: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    # Writes a tile: see PLAIN, GATED and ADDED. `up` is read for GATED only, `before`, the residual, for ADDED only.
    mask = in_rows[:, None]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SCALED:
        acc = acc * scale[:, None]
    if BIAS:
        acc += tl.load(bias + columns).to(tl.float32)[None, :]
    if TERMS:
        slots = slots_of(runs, rows, ADAPTERS)
        acc = with_terms(acc, terms, slots, terms_stride, columns, 2 * N if KIND == 1 else N)
    if KIND == 1:
        if SCALED:
            up = up * scale[:, None]
        if BIAS:
            up += tl.load(bias + N + columns).to(tl.float32)[None, :]
        if TERMS:
            up = with_terms(up, terms, slots, terms_stride, N + columns, 2 * N)
        acc = acc * tl.sigmoid(acc) * up
    if KIND == 2:
        acc += before
        tl.store(residual + at, acc, mask=mask)
        if NEXT:
            tl.store(out_squares + rows * OUT_PARTS + tile, tl.sum(acc * acc, 1), mask=in_rows)
            acc = acc * tl.load(norm + columns).to(tl.float32)[None, :]
    if KIND != 2 or NEXT:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
