"""LoRA by merging: `W' = W + s * B A` of each adapter into a scratch weight, then one plain GEMM over its rows.

It costs a pass over W per adapter and nothing per row, so it wins with few adapters and many rows. The sum is formed in
float32 and W' rounded to the weight's dtype once. Error relative to float64 (norm of the error over norm of y, CPU):
2.4e-3 in bfloat16, 3e-4 in float16, of which rounding y itself is 1.7e-3 and 2.1e-4; it does not grow with K or rank.

Adapters that dominate traffic keep their merged weights within a byte budget. Letters as in `stack.py`, T rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ranklet.kernels import merge, native
from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.recut import check_rows
from ranklet.kernels.stack import EmbeddingStack, LinearStack, SlotMeta

_SCRATCH_BYTES = 64 << 20  # of weights merged at once, unless one alone is larger
_NEGLIGIBLE = 0.01  # of a batch's LoRA rows: fewer are not counted, which keeps batches of many adapters cheap


@dataclass(frozen=True, slots=True)
class _Copy:
    """One kept W'. It holds what it was made for, so that no other object can take on the same identity."""

    weight: Tensor
    meta: SlotMeta
    merged: Tensor


@dataclass(slots=True)
class KeptMerges:
    """Merged weights that outlive their batch, for slots with a large moving share of the LoRA rows. No locks.

    A slot starts to dominate at a share of `enter` and stops below `leave`. When the budget is full, a slot takes the
    room of another whose share is smaller by the factor `displace`, the smallest first. A copy is served only to the
    tenant it was made for: each load into a slot puts new `SlotMeta` objects there, and those are compared by identity.

    Attributes:
        max_bytes: the budget, never exceeded; 0 keeps nothing.
        half_life_batches: after as many batches of others, a slot's share has halved.
        held_bytes: what is kept now.

    Raises:
        ValueError: numbers that make no sense together.
    """

    max_bytes: int
    half_life_batches: float = 32.0
    enter: float = 0.3
    leave: float = 0.1
    displace: float = 1.5
    held_bytes: int = field(init=False, default=0)
    _shares: dict[int, float] = field(init=False, default_factory=dict)
    _dominating: set[int] = field(init=False, default_factory=set)
    _copies: dict[int, dict[int, _Copy]] = field(init=False, default_factory=dict)  # by slot, by id(weight)

    def __post_init__(self) -> None:
        sound = self.max_bytes >= 0 and self.half_life_batches > 0 and self.displace >= 1
        if not (sound and 0 < self.leave < self.enter <= 1):
            raise ValueError(
                "kept merges: expected max_bytes >= 0, half_life_batches > 0, displace >= 1, 0 < leave < enter <= 1, "
                f"got {self.max_bytes}, {self.half_life_batches}, {self.displace}, {self.leave}, {self.enter}"
            )

    def observe(self, batch: LoraBatch) -> None:
        """Count a batch, whatever its backend; to be called once per batch, before its forward."""
        if not self.max_bytes or not batch.lora_rows:
            return
        decay = 0.5 ** (1 / self.half_life_batches)
        gain = (1 - decay) / batch.lora_rows
        least = _NEGLIGIBLE * batch.lora_rows
        shares = {slot: share * decay for slot, share in self._shares.items() if share > _NEGLIGIBLE * (1 - decay)}
        for segment in batch.segments:
            rows = segment.stop - segment.start
            if rows >= least:
                shares[segment.slot] = shares.get(segment.slot, 0.0) + gain * rows
        self._shares = shares
        was = self._dominating
        self._dominating = {s for s, share in shares.items() if share >= (self.leave if s in was else self.enter)}
        for slot in was - self._dominating:
            self._release(slot)

    def share(self, slot: int) -> float:
        """The slot's moving share of the LoRA rows, 0 to 1."""
        return self._shares.get(slot, 0.0)

    def dominates(self, slot: int) -> bool:
        """Whether copies are kept for the slot as far as the budget goes."""
        return slot in self._dominating

    def find(self, slot: int, weight: Tensor, meta: SlotMeta) -> Tensor | None:
        """The copy of `weight` merged for the slot's present tenant, None if there is none."""
        copy = self._copies.get(slot, {}).get(id(weight))
        if copy is None:
            return None
        if copy.meta is not meta:
            self.forget(slot)
            return None
        return copy.merged

    def add(self, slot: int, weight: Tensor, meta: SlotMeta, merge: Callable[[Tensor], None]) -> Tensor | None:
        """Merge into a copy that is kept from now on; None if the slot does not dominate or there is no room.

        Args:
            merge: writes W' into the empty tensor it is given, shape and dtype those of `weight`.
        """
        if slot not in self._dominating or not self._make_room(slot, weight.nbytes):
            return None
        try:
            merged = _empty(weight)[0]
        except torch.OutOfMemoryError:
            self.drop()
            return None
        merge(merged)
        self._copies.setdefault(slot, {})[id(weight)] = _Copy(weight, meta, merged)
        self.held_bytes += merged.nbytes
        return merged

    def forget(self, slot: int) -> None:
        """The slot has another tenant: its copies and its share are void."""
        self._release(slot)
        self._shares.pop(slot, None)
        self._dominating.discard(slot)

    def drop(self) -> int:
        """Free everything, for a device short of memory, and halve the budget, so that the shortage does not return.

        Returns:
            The bytes freed; 0 means that trying the batch again is of no use.
        """
        freed, self.max_bytes = self.held_bytes, self.max_bytes // 2
        for slot in list(self._shares):
            self.forget(slot)
        return freed

    def _release(self, slot: int) -> None:
        self.held_bytes -= sum(copy.merged.nbytes for copy in self._copies.pop(slot, {}).values())

    def _make_room(self, slot: int, nbytes: int) -> bool:
        """Evict what the slot displaces, as little as will do, and nothing at all if that is not enough."""
        excess, chosen = self.held_bytes + nbytes - self.max_bytes, []
        if excess > 0:
            for copies, key in self._displaced_by(slot):
                chosen.append((copies, key))
                excess -= copies[key].merged.nbytes
                if excess <= 0:
                    break
        if excess > 0:
            return False
        for copies, key in chosen:
            self.held_bytes -= copies.pop(key).merged.nbytes
        return True

    def _displaced_by(self, slot: int) -> Iterator[tuple[dict[int, _Copy], int]]:
        for other in sorted(self._copies, key=self.share):
            if self.share(other) * self.displace <= self.share(slot) and other != slot:
                yield from ((self._copies[other], key) for key in reversed(self._copies[other]))


class Merged:
    """The backend: scratch weights it uses again for each shape, and the copies it keeps. One thread, one stream.

    Args:
        budget_bytes: for kept copies, on top of the scratch weights (of each shape of projection as many as one launch
            merges, or 64 MiB of them if that is less).
    """

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
            self._scratch[key] = _empty(weight, count)
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


def _empty(weight: Tensor, count: int = 1) -> Tensor:
    """[count, N, K], an ordinary tensor even in inference mode: scratch outlives it, and is written again outside."""
    with torch.inference_mode(False):
        return torch.empty((count, *weight.shape), dtype=weight.dtype, device=weight.device)


MERGED = Merged()
linear = MERGED.linear
embedding = MERGED.embedding
