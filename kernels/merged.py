"""LoRA by merging: `W' = W + s * B A` of each adapter into a scratch weight, then one plain GEMM over its rows.

It costs a pass over W per adapter and nothing per row, so it wins with few adapters and many rows. The sum is formed in
float32 and W' rounded to the weight's dtype once. Error relative to float64 (norm of the error over norm of y, CPU):
2.4e-3 in bfloat16, 3e-4 in float16, of which rounding y itself is 1.7e-3 and 2.1e-4; it does not grow with K or rank.

Adapters that dominate traffic keep their merged weights within a byte budget. Letters as in `stack.py`, T rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import merge, native
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.kept_merges import KeptMerges, empty
from ranklet.kernels.row_subset import check_rows
from ranklet.kernels.stack import EmbeddingStack, LinearStack

_SCRATCH_BYTES = 64 << 20  # of weights merged at once, unless one alone is larger


class Merged:
    """The backend: scratch weights it uses again for each shape, and the copies it keeps. One thread, one stream.

    Args:
        budget_bytes: for kept copies, on top of the scratch weights (of each shape of projection as many as one launch
            merges, or 64 MiB of them if that is less).
    """

    NAME = "merged"

    def __init__(self, budget_bytes: int = 0) -> None:
        self.kept = KeptMerges(budget_bytes)
        self._scratch: dict[tuple[torch.device, torch.dtype, torch.Size], Tensor] = {}

    def observe(self, batch: LoraBatch) -> None:
        """Count a batch, whatever its backend; to be called once per batch, before its forward."""
        self.kept.observe(batch)

    def drop(self) -> int:
        """Free what is kept, and the scratch weights; returns the kept bytes, see `KeptMerges.drop`."""
        self._scratch.clear()
        return self.kept.drop()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, stack: LinearStack, batch: LoraBatch) -> Tensor:
        """Base projection plus each segment's LoRA.

        Semantics: `y[t] = (W + s * B A) x[t] + bias`, with A, B, s of row t's adapter.

        Args:
            x: [T, K].
            weight: [N, K], contiguous.
            bias: [N] or None.

        Returns:
            [T, N], freshly allocated.

        Raises:
            ValueError: x has other rows than the batch.
        """
        check_rows(x, batch)
        runs = _runs(stack, batch)
        if not any(slot is not None for slot, _, _ in runs):
            return functional.linear(x, weight, bias)
        y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        at_once = max(1, min(merge.AT_ONCE, _SCRATCH_BYTES // weight.nbytes))
        for first in range(0, len(runs), at_once):
            some = runs[first : first + at_once]
            merges = self._merges(weight, stack, [slot for slot, _, _ in some if slot is not None])
            for slot, start, stop in some:
                w = weight if slot is None else merges[slot]
                if bias is None:
                    torch.mm(x[start:stop], w.t(), out=y[start:stop])
                else:
                    torch.addmm(bias, x[start:stop], w.t(), out=y[start:stop])
        return y

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: LoraBatch) -> Tensor:
        """As `native.embedding`: a lookup reads few rows of the table, so merging all of them never pays."""
        return native.embedding(ids, table, stack, batch)

    def _merges(self, weight: Tensor, stack: LinearStack, slots: Sequence[int]) -> dict[int, Tensor]:
        """W' of each slot: kept copies as they are, the others in scratch, where the next call overwrites them."""
        merges: dict[int, Tensor] = {}
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph would outlive a kept copy
            for slot in slots:
                kept = self._kept(weight, stack, slot)
                if kept is not None:
                    merges[slot] = kept
        fresh = [slot for slot in dict.fromkeys(slots) if slot not in merges]
        if fresh:
            scratch = self._scratch_for(weight, len(fresh))
            _merge(scratch, weight, stack, fresh)
            merges.update(zip(fresh, scratch, strict=False))
        return merges

    def _kept(self, weight: Tensor, stack: LinearStack, slot: int) -> Tensor | None:
        meta = stack.meta[slot]
        kept = self.kept.find(slot, weight, meta)
        if kept is None:
            kept = self.kept.add(slot, weight, meta, lambda out: _merge(out[None], weight, stack, [slot]))
        return kept

    def _scratch_for(self, weight: Tensor, count: int) -> Tensor:
        key = (weight.device, weight.dtype, weight.shape)
        if key not in self._scratch or len(self._scratch[key]) < count:
            self._scratch.pop(key, None)
            self._scratch[key] = empty(weight, count)
        return self._scratch[key]


def _merge(out: Tensor, weight: Tensor, stack: LinearStack, slots: Sequence[int]) -> None:
    """Write `W' = W + s * B A` of slots[i] to out[i] [N, K]; slices that are not targeted stay W."""
    if weight.is_cuda:
        merge.merge(out, weight, stack, slots)
        return
    for merged, slot in zip(out, slots, strict=False):
        meta, column = stack.meta[slot], 0
        for index, (width, rank) in enumerate(zip(stack.widths, meta.ranks, strict=True)):
            rows = slice(column, column + width)
            if rank:
                a = stack.a[slot, index * stack.rank : index * stack.rank + rank]
                b = stack.b[slot, rows, :rank].contiguous()  # oneDNN's AMX product reads on behind an odd rank
                torch.addmm(weight[rows], b, a, alpha=meta.scalings[index], out=merged[rows])
            else:
                merged[rows] = weight[rows]
            column += width


def _runs(stack: LinearStack, batch: LoraBatch) -> list[tuple[int | None, int, int]]:
    """Slot (None: base), start and stop of each product to make; base rows that stand side by side are one."""
    runs: list[tuple[int | None, int, int]] = []
    for segment in batch.segments:
        slot = segment.slot if any(stack.meta[segment.slot].ranks) else None
        _append(runs, slot, segment.start, segment.stop)
    _append(runs, None, batch.lora_rows, batch.rows)
    return runs


def _append(runs: list[tuple[int | None, int, int]], slot: int | None, start: int, stop: int) -> None:
    if slot is None and runs and runs[-1][0] is None:
        runs[-1] = (None, runs[-1][1], stop)
    elif stop > start:
        runs.append((slot, start, stop))
