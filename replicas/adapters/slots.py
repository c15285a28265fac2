"""Assigns slots to adapters: states, references, pins and LRU eviction. No tensors, no locks.

A slot is free, loading or ready. A ready slot that batches still use can be marked as retiring: it takes no new work,
and is evicted after its last reference is released, unless it is revived first. A slot with references or a pin is
never evicted.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ranklet.replicas.adapters.reference import AdapterRef


@dataclass(slots=True)
class Slot:
    """State of one slot."""

    index: int
    key: AdapterRef | None = None
    ready: bool = False
    retiring: bool = False
    references: int = 0


@dataclass(slots=True)
class SlotTable:
    """The slots of one device.

    Attributes:
        pinned: names of adapters that are never evicted.
        on_freed: called with each slot that an adapter loses.
    """

    count: int
    pinned: set[str] = field(default_factory=set)
    on_freed: Callable[[int], None] = lambda index: None
    _slots: list[Slot] = field(init=False)
    _by_key: OrderedDict[AdapterRef, Slot] = field(init=False)  # least recently used first

    def __post_init__(self) -> None:
        self._slots = [Slot(index) for index in range(self.count)]
        self._by_key = OrderedDict()

    def usable(self, key: AdapterRef) -> int | None:
        """Return the slot in which an adapter can take new work; None if it has no slot, is loading or retiring."""
        slot = self._by_key.get(key)
        return slot.index if slot is not None and slot.ready and not slot.retiring else None

    def holds(self, key: AdapterRef) -> bool:
        """Whether the adapter has a slot, ready or loading."""
        return key in self._by_key

    def slot_of(self, key: AdapterRef) -> int | None:
        """Return the slot of an adapter, ready or loading."""
        slot = self._by_key.get(key)
        return None if slot is None else slot.index

    def acquire(self, key: AdapterRef) -> int:
        """Add a reference to a usable adapter and make it the most recently used. Returns its slot."""
        slot = self._by_key[key]
        slot.references += 1
        self._by_key.move_to_end(key)
        return slot.index

    def release(self, key: AdapterRef) -> None:
        """Undo one `acquire`."""
        slot = self._by_key[key]
        if slot.references == 0:
            raise ValueError(f"release of {key.name!r} without an acquire")
        slot.references -= 1

    def reserve(self, key: AdapterRef, keep: Collection[AdapterRef] = ()) -> tuple[int, AdapterRef | None] | None:
        """Give an adapter a slot to load into: a free one, else an idle one, retiring or least recently used.

        Args:
            keep: adapters that must not be evicted for this one.

        Returns:
            The slot and the adapter evicted from it, if any; None if no slot is free or idle (see `retire`).
        """
        if key in self._by_key:
            raise ValueError(f"{key.name!r} has a slot already")
        slot = next((slot for slot in self._slots if slot.key is None), None)
        idle = () if slot is not None else self.idle(keep)
        if idle:
            slot = self._by_key[idle[0]]
        if slot is None:
            return None
        evicted = slot.key
        if evicted is not None:
            self.free(evicted)
        self._slots[slot.index] = self._by_key[key] = Slot(slot.index, key)
        return slot.index, evicted

    def idle(self, keep: Collection[AdapterRef] = ()) -> list[AdapterRef]:
        """Return the adapters that may be evicted: those that retire, then the others, least recently used first."""
        found = [
            key
            for key, slot in self._by_key.items()
            if slot.ready and slot.references == 0 and key.name not in self.pinned and key not in keep
        ]
        return sorted(found, key=lambda key: not self._by_key[key].retiring)

    def retire(self, keep: Collection[AdapterRef] = ()) -> None:
        """Retire the least recently used slot that may be evicted, unless a slot is retiring or loading already."""
        if any(slot.retiring or not slot.ready for slot in self._by_key.values()):
            return
        for key, slot in self._by_key.items():
            if key.name not in self.pinned and key not in keep:
                slot.retiring = True
                return

    def revive(self, key: AdapterRef) -> bool:
        """Let a retiring adapter take new work again. Returns whether the adapter was retiring."""
        slot = self._by_key.get(key)
        if slot is None or not slot.retiring:
            return False
        slot.retiring = False
        return True

    def mark_ready(self, key: AdapterRef) -> None:
        self._by_key[key].ready = True

    def free(self, key: AdapterRef) -> None:
        slot = self._by_key.pop(key)
        self._slots[slot.index] = Slot(slot.index)
        self.on_freed(slot.index)

    def drop(self, key: AdapterRef) -> bool:
        """Free an adapter's slot. Returns False if it has none, is loading or in use."""
        slot = self._by_key.get(key)
        if slot is None or not slot.ready or slot.references:
            return False
        self.free(key)
        return True

    def held(self) -> tuple[AdapterRef, ...]:
        """Return the adapters with a slot, ready or loading."""
        return tuple(self._by_key)

    def resident(self) -> tuple[AdapterRef, ...]:
        """Return the usable adapters, least recently used first."""
        return tuple(key for key in self._by_key if self.usable(key) is not None)
