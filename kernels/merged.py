"""LoRA by merging: `W' = gain * (W + s B A)` of each adapter in a scratch weight, then one plain product over its rows.

Merging costs a pass over W per adapter and nothing per row, so this backend is fast with few adapters and many rows.
The sum is computed in float32, and W' is rounded to the weight's dtype once. On a CPU, the error relative to float64
(norm of the error over norm of y) is 2.4e-3 in bfloat16 and 3e-4 in float16. Rounding y alone causes 1.7e-3 and 2.1e-4.
The error does not grow with K or rank.

Letters as in `stack.py`; T rows (tokens) of the batch.
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

_SCRATCH_BYTES = 64 << 20  # of weights merged at once, unless a single weight is larger


class Merged:
    """The `merged` backend of one engine: its scratch weights, and the merged weights it keeps between batches.

    Not thread-safe, and for one stream only.

    Args:
        budget_bytes: device memory for kept weights. Scratch needs more: for each shape of projection, the weights that
            one launch merges, up to 64 MiB or one weight.
    """

    NAME = "merged"

    def __init__(self, budget_bytes: int = 0) -> None:
        self.kept = KeptMerges(budget_bytes)
        self._scratch: dict[tuple[torch.device, torch.dtype, torch.Size], Tensor] = {}

    @property
    def scratch_bytes(self) -> int:
        return sum(scratch.nbytes for scratch in self._scratch.values())

    def observe(self, batch: LoraBatch) -> None:
        """Update the shares of the slots. Call it once per batch of any backend, before the forward pass."""
        self.kept.observe(batch)

    def drop(self) -> int:
        """Free scratch and kept weights and halve the budget, after the device ran out of memory.

        Returns:
            The bytes of kept weights freed. If 0, retrying the batch does not help.
        """
        self._scratch.clear()
        return self.kept.drop()

    def linear(
        self,
        x: Tensor,  # [T, K]
        weight: Tensor,  # [N, K], contiguous
        bias: Tensor | None,  # [N]
        stack: LinearStack,
        batch: LoraBatch,
    ) -> Tensor:
        """Compute a projection with LoRA. Returns a new tensor [T, N].

        Semantics: `y[t] = gain * ((W + s B A) x[t] + bias) + shift`, with A, B, s and column terms of row t's adapter.

        Raises:
            ValueError: `x` does not have the batch's number of rows.
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
                own_bias = bias if slot is None else _bias(bias, stack, slot, y.dtype)
                if own_bias is None:
                    torch.mm(x[start:stop], w.t(), out=y[start:stop])
                else:
                    torch.addmm(own_bias, x[start:stop], w.t(), out=y[start:stop])
        return y

    def embedding(self, ids: Tensor, table: Tensor, stack: EmbeddingStack, batch: LoraBatch) -> Tensor:
        # A lookup reads few rows of the table: merging the whole table never pays.
        return native.embedding(ids, table, stack, batch)

    def _merges(self, weight: Tensor, stack: LinearStack, slots: Sequence[int]) -> dict[int, Tensor]:
        """Return W' of each slot: a kept merge, or scratch that the next call overwrites."""
        merges: dict[int, Tensor] = {}
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph would outlive a kept merge
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


def _bias(bias: Tensor | None, stack: LinearStack, slot: int, dtype: torch.dtype) -> Tensor | None:
    if stack.terms is None or not stack.meta[slot].terms:
        return bias
    gain, shift = stack.terms[slot]
    return (shift if bias is None else torch.addcmul(shift, bias.float(), gain)).to(dtype)


def _merge(out: Tensor, weight: Tensor, stack: LinearStack, slots: Sequence[int]) -> None:
    if weight.is_cuda:
        merge.merge(out, weight, stack, slots)
        return
    for merged, slot in zip(out, slots, strict=False):
        meta, column = stack.meta[slot], 0
        for index, (width, rank) in enumerate(zip(stack.widths, meta.ranks, strict=True)):
            rows = slice(column, column + width)
            if rank:
                a = stack.a[slot, index * stack.rank : index * stack.rank + rank]
                b = stack.b[slot, rows, :rank].contiguous()  # oneDNN's AMX product reads beyond an odd rank
                torch.addmm(weight[rows], b, a, alpha=meta.scalings[index], out=merged[rows])
            else:
                merged[rows] = weight[rows]
            column += width
        if stack.terms is not None and meta.terms:
            merged.copy_(merged.float() * stack.terms[slot, 0, :, None])


def _runs(stack: LinearStack, batch: LoraBatch) -> list[tuple[int | None, int, int]]:
    # Returns slot (None: base model), start and stop of each product. Adjacent base rows are one product.
    runs: list[tuple[int | None, int, int]] = []
    for segment in batch.segments:
        slot = segment.slot if stack.meta[segment.slot].adapts else None
        _append(runs, slot, segment.start, segment.stop)
    _append(runs, None, batch.lora_rows, batch.rows)
    return runs


def _append(runs: list[tuple[int | None, int, int]], slot: int | None, start: int, stop: int) -> None:
    if slot is None and runs and runs[-1][0] is None:
        runs[-1] = (None, runs[-1][1], stop)
    elif stop > start:
        runs.append((slot, start, stop))
