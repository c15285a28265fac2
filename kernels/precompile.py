"""Compiling before the first request: Triton takes seconds for a kernel that it has not met.

What it made is kept on disk, so only the first start on a machine, or after an update, takes long.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ranklet.kernels import csgmv, merge
from ranklet.kernels.batch import SHORT_HEIGHTS, TALL_HEIGHTS, LoraBatch
from ranklet.kernels.packs import PACKS
from ranklet.kernels.rotary import Rotary
from ranklet.kernels.stack import LinearStack, SlotMeta
from ranklet.kernels.workloads import even

HEIGHTS = (*SHORT_HEIGHTS, *TALL_HEIGHTS)
_BATCH_ROWS = (1, 256, 1024, 4096)  # sizes that tables of tiles tell apart


def batches(slots: int, most_rows: int) -> Iterator[LoraBatch]:
    """Batches that between them launch every kernel, the largest first.

    Of each size one with as many adapters as it can hold, the rest base rows, and one with a few adapters' rows among
    base rows, too few for one product of base and LoRA.
    """
    for rows in sorted({min(rows, most_rows) for rows in (*_BATCH_ROWS, most_rows)}, reverse=True):
        for height in HEIGHTS:
            adapters = max(1, min(slots, rows // height))
            used = rows if height == HEIGHTS[-1] else min(rows, adapters * height)
            yield replace(even(used, adapters), rows=rows)
            if rows > height:
                yield replace(even(height, 1), rows=rows)


@torch.inference_mode()
def precompile(stacks: Sequence[LinearStack], most_rows: int, rotary: Rotary | None = None) -> int:
    """Launch what `csgmv` and `merged` launch on batches of up to so many rows, once each; the results are thrown away.

    Args:
        stacks: one of each projection; nothing is written to them, and what is in their slots does not matter.
        rotary: of `most_rows` positions; goes with the packed queries, keys and values.

    Returns:
        How many batches of projections were run.
    """
    done = 0
    for stack in stacks:
        device, dtype, wide, slots = stack.a.device, stack.a.dtype, stack.a.shape[2], stack.a.shape[0]
        full = LinearStack(stack.a, stack.b, stack.widths, stack.ranks, stack.scalings)
        slices = len(stack.widths)
        full.meta = [SlotMeta((stack.rank,) * slices, (1.0,) * slices)] * slots
        weight = torch.zeros(sum(stack.widths), wide, dtype=dtype, device=device)
        x = torch.zeros(most_rows, wide, dtype=dtype, device=device)
        turned = rotary if slices == len(PACKS["qkv"]) else None
        for batch in batches(slots, most_rows):
            csgmv.linear(x[: batch.rows], weight, None, full, batch.placed(device), turned)
            done += 1
        merge.merge(torch.empty(1, *weight.shape, dtype=dtype, device=device), weight, full, [0])
    return done
