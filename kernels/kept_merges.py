"""Merged weights of the adapters that dominate traffic, kept from batch to batch within a byte budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.stack import SlotMeta

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
            merged = empty(weight)[0]
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


def empty(weight: Tensor, count: int = 1) -> Tensor:
    """[count, N, K], an ordinary tensor even in inference mode: scratch outlives it, and is written again outside."""
    with torch.inference_mode(False):
        return torch.empty((count, *weight.shape), dtype=weight.dtype, device=weight.device)
