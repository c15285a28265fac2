"""The product of a short batch. If there are few tiles, several programs share a tile, each with a part of K.

The program that finishes last sums the parts in the order of K, so the result does not depend on the order of arrival.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

import triton
import triton.language as tl

from ranklet.kernels.row_steps import add_lora, finish, row_scale, run_group, runs_in


@triton.jit(do_not_specialize=["count", "row_blocks"], do_not_specialize_on_alignment=["runs", "terms"])
def split_kernel(
    x_tma, w_tma, squares, bias, h, b, runs, terms, out, residual, norm, out_squares, parts, arrivals, count,
    row_blocks, eps, h_stride, b_slot_stride, terms_stride,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    IN_PARTS: tl.constexpr, IN_BLOCK: tl.constexpr, OUT_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, RUNS: tl.constexpr,
    ADAPTERS: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # programs that share columns of W are neighbours
    row_block = program % row_blocks
    part = program // row_blocks % SPLIT
    tile = program // (row_blocks * SPLIT)
    first = tile * BLOCK_N
    low_row = row_block * BLOCK_M
    SPAN: tl.constexpr = ((K + SPLIT - 1) // SPLIT + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    low = part * SPAN
    EARLY: tl.constexpr = BLOCK_N <= 32  # B of wider tiles would take shared memory from the loop over K
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        if not LORA:
            tl.extra.cuda.gdc_wait()
    rows = low_row + tl.arange(0, BLOCK_M)
    in_rows = rows < count
    columns = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = acc
    scale = acc
    if IN_PARTS > 0:
        scale = row_scale(squares, rows, in_rows, eps, K, IN_PARTS, IN_BLOCK)
    if LORA:
        first_run, end_run = runs_in(runs, low_row, ADAPTERS, BLOCK_M)
        if EARLY:
            start, stop, weight = run_group(
                b, runs, first_run, end_run, low_row, columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
            )
            if KIND == 1:
                _, _, up_weight = run_group(
                    b, runs, first_run, end_run, low_row, N + columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
                )
    before = acc
    if KIND == 2:  # the launches between have waited for the one that wrote the residual stream
        at = residual + rows.to(tl.int64)[:, None] * N + columns[None, :]
        before = tl.load(at, mask=in_rows[:, None], other=0.0)
    for k in tl.range(low, tl.minimum(low + SPAN, K), BLOCK_K, num_stages=STAGES):
        xs = x_tma.load([low_row, k])
        acc = tl.dot(xs, w_tma.load([first, k]).T, acc, input_precision=PRECISION)
        if KIND == 1:
            up = tl.dot(xs, w_tma.load([N + first, k]).T, up, input_precision=PRECISION)
    if LORA and part == 0:
        piece = (first >= W0).to(tl.int32) + (first >= W0 + W1).to(tl.int32) if KIND != 1 else 0
        if not EARLY:
            start, stop, weight = run_group(
                b, runs, first_run, end_run, low_row, columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
            )
        acc = add_lora(
            acc, h, b, runs, start, stop, weight, first_run, end_run, rows, low_row, piece, columns, h_stride,
            b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M, PRECISION, CHAINED,
        )  # fmt: skip
        if KIND == 1:
            if not EARLY:
                start, stop, up_weight = run_group(
                    b, runs, first_run, end_run, low_row, N + columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
                )
            up = add_lora(
                up, h, b, runs, start, stop, up_weight, first_run, end_run, rows, low_row, 1, N + columns, h_stride,
                b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M, PRECISION, CHAINED,
            )  # fmt: skip
    elif LORA and CHAINED:
        tl.extra.cuda.gdc_wait()
    last = True
    if SPLIT > 1:
        place = tile * row_blocks + row_block
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N * (2 if KIND == 1 else 1)
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts_at = parts + place * SPLIT * SIZE + inner
        tl.store(parts_at + part * SIZE, acc)
        if KIND == 1:
            tl.store(parts_at + part * SIZE + BLOCK_M * BLOCK_N, up)
        tl.debug_barrier()  # every thread's part is written before the arrival is counted
        last = tl.atomic_add(arrivals + place, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.load(parts_at, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                acc += tl.load(parts_at + other * SIZE, cache_modifier=".cg")
            if KIND == 1:
                up = tl.load(parts_at + BLOCK_M * BLOCK_N, cache_modifier=".cg")
                for other in tl.static_range(1, SPLIT):
                    up += tl.load(parts_at + other * SIZE + BLOCK_M * BLOCK_N, cache_modifier=".cg")
            tl.store(arrivals + place, 0)
    if last:
        finish(
            acc, up, scale, before, rows, in_rows, columns, tile, N, bias, runs, terms, terms_stride, out, residual,
            norm, out_squares, OUT_PARTS, IN_PARTS > 0, BIAS, TERMS, ADAPTERS, KIND, NEXT,
        )  # fmt: skip
