"""The product of a few rows: the weight is streamed once, and the warps of a program share its tile by parts of K.

With one adapter in the batch, each program may also compute `s A x` itself (OWN): A comes from the L2 cache, and no
launch or wait is needed between the halves of LoRA. Otherwise `row_shrink.py` has computed it before.

B, and with EARLY the first weights and A, are loaded before waiting for the launch before, which does not write them.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

import triton
import triton.language as tl

from ranklet.kernels.row_steps import add_lora, finish, halves, row_scale, run_group, runs_in, weight_rows_of


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["runs", "terms"])
def thin_kernel(
    x, squares, w, bias, a, h, b, runs, scalings, terms, out, residual, norm, out_squares, count, eps,
    x_stride, meta_stride, a_slot_stride, h_stride, b_slot_stride, terms_stride,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    IN_PARTS: tl.constexpr, IN_BLOCK: tl.constexpr, OUT_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, OWN: tl.constexpr,
    RUNS: tl.constexpr, ADAPTERS: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
    EARLY: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tile * BLOCK_N
    low_row = tl.program_id(1) * BLOCK_M
    rows = low_row + tl.arange(0, BLOCK_M)
    in_rows = rows < count
    columns = first + tl.arange(0, BLOCK_N)
    weight_rows = weight_rows_of(first, N, BLOCK_N, KIND)
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    SPAN: tl.constexpr = ((K + PARTS - 1) // PARTS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    EVEN: tl.constexpr = SPAN * PARTS == K
    ks = tl.arange(0, PARTS)[:, None, None] * SPAN + tl.arange(0, BLOCK_K)[None, None, :]
    x_at = x + rows[None, :, None] * x_stride + ks
    w_at = w + weight_rows.to(tl.int64)[None, :, None] * K + ks
    in_x = in_rows[None, :, None]
    WIDTH: tl.constexpr = 2 * BLOCK_N if KIND == 1 else BLOCK_N
    RANKS: tl.constexpr = 2 * BLOCK_R if KIND == 1 else BLOCK_R
    piece = (first >= W0).to(tl.int32) + (first >= W0 + W1).to(tl.int32) if KIND != 1 else 0
    acc = tl.zeros((PARTS, BLOCK_M, WIDTH), tl.float32)
    if EARLY:
        w_first = tl.load(w_at) if EVEN else tl.load(w_at, mask=ks < K, other=0.0)
    if OWN:
        r = tl.arange(0, RANKS)
        in_a = (r % BLOCK_R < R)[None, :, None]
        slot = tl.load(runs + 2).to(tl.int64)
        own = (rows >= tl.load(runs)) & (rows < tl.load(runs + 1))
        scaling = scalings + slot * meta_stride + piece
        a_at = a + slot * a_slot_stride + ((piece * R + r // BLOCK_R * R + r % BLOCK_R) * K)[None, :, None] + ks
        shrunk = tl.zeros((PARTS, BLOCK_M, RANKS), tl.float32)
        if EARLY:
            a_first = tl.load(a_at, mask=in_a if EVEN else in_a & (ks < K), other=0.0)
        ranks = tl.arange(0, BLOCK_R)
        b_at = b + slot * b_slot_stride + columns[:, None] * R + ranks[None, :]
        in_b = (ranks < R)[None, :]
        b_first = tl.load(b_at, mask=in_b, other=0.0)
        if KIND == 1:
            b_second = tl.load(b_at + N * R, mask=in_b, other=0.0)
    elif LORA:
        first_run, end_run = runs_in(runs, low_row, ADAPTERS, BLOCK_M)
        start, stop, b_first = run_group(
            b, runs, first_run, end_run, low_row, columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
        )
        if KIND == 1:
            _, _, b_second = run_group(
                b, runs, first_run, end_run, low_row, N + columns, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M
            )
    if CHAINED and (OWN or not LORA):
        tl.extra.cuda.gdc_wait()
    before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KIND == 2:
        at = residual + rows.to(tl.int64)[:, None] * N + columns[None, :]
        before = tl.load(at, mask=in_rows[:, None], other=0.0)
    scale = before
    if IN_PARTS > 0:
        scale = row_scale(squares, rows, in_rows, eps, K, IN_PARTS, IN_BLOCK)
    if EARLY:
        x_first = tl.load(x_at, mask=in_x if EVEN else in_x & (ks < K), other=0.0)
        acc = tl.dot(x_first, tl.permute(w_first, (0, 2, 1)), acc, input_precision=PRECISION)
        if OWN:
            shrunk = tl.dot(x_first, tl.permute(a_first, (0, 2, 1)), shrunk, input_precision=PRECISION)
    BEGIN: tl.constexpr = BLOCK_K if EARLY else 0
    for k in tl.range(BEGIN, SPAN, BLOCK_K, num_stages=STAGES):
        xs = tl.load(x_at + k, mask=in_x if EVEN else in_x & (ks + k < K), other=0.0)
        ws = tl.load(w_at + k) if EVEN else tl.load(w_at + k, mask=ks + k < K, other=0.0)
        acc = tl.dot(xs, tl.permute(ws, (0, 2, 1)), acc, input_precision=PRECISION)
        if OWN:
            as_ = tl.load(a_at + k, mask=in_a if EVEN else in_a & (ks + k < K), other=0.0)
            shrunk = tl.dot(xs, tl.permute(as_, (0, 2, 1)), shrunk, input_precision=PRECISION)
    product = tl.sum(acc, 0)
    up = product
    if KIND == 1:
        product, up = halves(product, BLOCK_M, BLOCK_N)
    if OWN:
        hidden = tl.where(own[:, None], tl.sum(shrunk, 0), 0.0)
        if KIND == 1:
            hidden, up_hidden = halves(hidden, BLOCK_M, BLOCK_R)
            up_hidden = (up_hidden * tl.load(scaling + 1)).to(b.dtype.element_ty)
            up = tl.dot(up_hidden, tl.trans(b_second), up, input_precision=PRECISION)
        hidden = (hidden * tl.load(scaling)).to(b.dtype.element_ty)
        product = tl.dot(hidden, tl.trans(b_first), product, input_precision=PRECISION)
    elif LORA:
        product = add_lora(
            product, h, b, runs, start, stop, b_first, first_run, end_run, rows, low_row, piece, columns,
            h_stride, b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M, PRECISION, CHAINED,
        )  # fmt: skip
        if KIND == 1:
            up = add_lora(
                up, h, b, runs, start, stop, b_second, first_run, end_run, rows, low_row, 1, N + columns, h_stride,
                b_slot_stride, R, BLOCK_R, RUNS, BLOCK_M, PRECISION, CHAINED,
            )  # fmt: skip
    finish(
        product, up, scale, before, rows, in_rows, columns, tile, N, bias, runs, terms, terms_stride, out, residual,
        norm, out_squares, OUT_PARTS, IN_PARTS > 0, BIAS, TERMS, ADAPTERS, KIND, NEXT,
    )  # fmt: skip
