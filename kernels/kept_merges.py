"""Merged weights of adapters that dominate traffic, kept between batches within a byte budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.stack import SlotMeta

_NEGLIGIBLE = 0.01  # share of a batch's LoRA rows; smaller segments are not counted, which keeps `observe` fast


@dataclass(frozen=True, slots=True)
class _KeptMerge:
    """One kept W'. It refers to weight and meta so that their ids are not reused for other objects."""

    weight: Tensor
    meta: SlotMeta
    merged: Tensor


@dataclass(slots=True)
class KeptMerges:
    """Merged weights of the slots that dominate: their moving average share of the LoRA rows is large. Not thread-safe.

    A slot starts to dominate at a share of `enter` and stops below `leave`. When the budget is full, a new merge evicts
    merges of slots whose share is smaller by the factor `displace`, smallest share first. A merge is valid only for the
    adapter that it was made for: each load into a slot creates new `SlotMeta` objects, which are compared by identity.

    Attributes:
        max_bytes: the budget, never exceeded; 0 keeps nothing.
        half_life_batches: after this many batches of other slots, a slot's share has halved.
        held_bytes: size of the kept weights.

    Raises:
        ValueError: a number is out of range.
    """

    max_bytes: int
    half_life_batches: float = 32.0
    enter: float = 0.3
    leave: float = 0.1
    displace: float = 1.5
    held_bytes: int = field(init=False, default=0)
    _shares: dict[int, float] = field(init=False, default_factory=dict)
    _dominating: set[int] = field(init=False, default_factory=set)
    _merges: dict[int, dict[int, _KeptMerge]] = field(init=False, default_factory=dict)  # by slot, by id(weight)

    def __post_init__(self) -> None:
        sound = self.max_bytes >= 0 and self.half_life_batches > 0 and self.displace >= 1
        if not (sound and 0 < self.leave < self.enter <= 1):
            raise ValueError(
                "kept merges: expected max_bytes >= 0, half_life_batches > 0, displace >= 1, 0 < leave < enter <= 1, "
                f"got {self.max_bytes}, {self.half_life_batches}, {self.displace}, {self.leave}, {self.enter}"
            )

    def observe(self, batch: LoraBatch) -> None:
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
            self._free(slot)

    def share(self, slot: int) -> float:
        return self._shares.get(slot, 0.0)

    def dominates(self, slot: int) -> bool:
        return slot in self._dominating

    def find(self, slot: int, weight: Tensor, meta: SlotMeta) -> Tensor | None:
        kept = self._merges.get(slot, {}).get(id(weight))
        if kept is None:
            return None
        if kept.meta is not meta:
            self.forget(slot)
            return None
        return kept.merged

    def add(self, slot: int, weight: Tensor, meta: SlotMeta, merge: Callable[[Tensor], None]) -> Tensor | None:
        """Merge into a new tensor and keep it. Returns None if the slot does not dominate or the budget is full.

        Args:
            merge: writes W' to an empty tensor with shape and dtype of `weight`.
        """
        if not self.dominates(slot) or not self._evict_for(slot, weight.nbytes):
            return None
        try:
            merged = empty(weight)[0]
        except torch.OutOfMemoryError:
            self.drop()
            return None
        merge(merged)
        self._merges.setdefault(slot, {})[id(weight)] = _KeptMerge(weight, meta, merged)
        self.held_bytes += merged.nbytes
        return merged

    def forget(self, slot: int) -> None:
        """Free the merges and reset the share of a slot that holds another adapter."""
        self._free(slot)
        self._shares.pop(slot, None)
        self._dominating.discard(slot)

    def drop(self) -> int:
        """Free all merges and halve the budget, after the device ran out of memory. Returns the bytes freed."""
        freed, self.max_bytes = self.held_bytes, self.max_bytes // 2
        for slot in list(self._shares):
            self.forget(slot)
        return freed

    def _free(self, slot: int) -> None:
        self.held_bytes -= sum(one.merged.nbytes for one in self._merges.pop(slot, {}).values())

    def _evict_for(self, slot: int, nbytes: int) -> bool:
        excess, chosen = self.held_bytes + nbytes - self.max_bytes, []
        if excess > 0:
            for merges, key in self._evictable_by(slot):
                chosen.append((merges, key))
                excess -= merges[key].merged.nbytes
                if excess <= 0:
                    break
        if excess > 0:
            return False
        for merges, key in chosen:
            self.held_bytes -= merges.pop(key).merged.nbytes
        return True

    def _evictable_by(self, slot: int) -> Iterator[tuple[dict[int, _KeptMerge], int]]:
        for other in sorted(self._merges, key=self.share):
            if self.share(other) * self.displace <= self.share(slot) and other != slot:
                yield from ((self._merges[other], key) for key in reversed(self._merges[other]))


def empty(weight: Tensor, count: int = 1) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
        return torch.empty((count, *weight.shape), dtype=weight.dtype, device=weight.device)
