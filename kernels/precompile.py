"""Compiles kernels before the first request, because each takes Triton seconds.

Triton caches compiled kernels on disk, so only the first start on a machine, or after an update, is slow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ranklet.kernels import csgmv, merge
from ranklet.kernels.batch import LoraBatch, plan_evenly
from ranklet.kernels.packs import PACKS
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.row_tiles import HEIGHTS
from ranklet.kernels.stack import LinearStack, SlotMeta

_BATCH_ROWS = (1, 256, 1024, 4096)  # sizes with different tiles in the tables


def batches(slots: int, most_rows: int) -> Iterator[LoraBatch]:
    """Yield batches that together launch every variant of every kernel, the largest first.

    For each size and tile height there is a batch with as many adapters as fit, and a batch with too few LoRA rows for
    the fused product of base and LoRA.
    """
    for rows in sorted({min(rows, most_rows) for rows in (*_BATCH_ROWS, most_rows)}, reverse=True):
        for height in HEIGHTS:
            adapters = max(1, min(slots, rows // height))
            used = rows if height == HEIGHTS[-1] else min(rows, adapters * height)
            yield replace(plan_evenly(used, adapters), rows=rows)
            if rows > height:
                yield replace(plan_evenly(height, 1), rows=rows)


@torch.inference_mode()
def precompile(stacks: Sequence[LinearStack], most_rows: int, rotary: Rotary | None = None) -> None:
    """Run every kernel that `csgmv` and `merged` launch on batches of up to `most_rows` rows, and discard the results.

    Args:
        stacks: one per projection. They are not written, and their slots may have any contents. With column terms, the
            kernels that apply them are run.
        rotary: for the packed queries, keys and values, with `most_rows` positions.
    """
    for stack in stacks:
        device, dtype, wide, slots = stack.a.device, stack.a.dtype, stack.a.shape[2], stack.a.shape[0]
        full = LinearStack(stack.a, stack.b, stack.widths, stack.ranks, stack.scalings, stack.terms)
        slices = len(stack.widths)
        terms = stack.terms is not None
        full.meta = [SlotMeta((stack.rank,) * slices, (1.0,) * slices, terms)] * slots
        weight = torch.zeros(sum(stack.widths), wide, dtype=dtype, device=device)
        x = torch.zeros(most_rows, wide, dtype=dtype, device=device)
        rotated = rotary if slices == len(PACKS["qkv"]) else None
        for batch in batches(slots, most_rows):
            placed = replace(batch, terms=terms).with_tiles(device)
            csgmv.linear(x[: batch.rows], weight, None, full, placed, rotated)
            if slices == len(PACKS["gate_up"]):
                csgmv.gated(x[: batch.rows], weight, None, full, placed)
        merge.merge(torch.empty(1, *weight.shape, dtype=dtype, device=device), weight, full, [0])
