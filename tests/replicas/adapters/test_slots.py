"""The slot table against a model: no adapter in use is evicted, and a retired one is evicted."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.slots import SlotTable

KEYS = [AdapterRef(f"adapter-{index}", f"/adapters/{index}", "1") for index in range(6)]
KEPT = st.frozensets(st.sampled_from(KEYS), max_size=2)


@dataclass
class ModelSlot:
    slot: int
    ready: bool = False
    retiring: bool = False
    references: int = 0


class Slots(RuleBasedStateMachine):
    """Random calls, each checked against `self.adapters`, least recently used first."""

    held = Bundle("held")  # references that batches hold

    @initialize(count=st.integers(1, 4), pinned=st.frozensets(st.sampled_from(KEYS), max_size=2))
    def begin(self, count: int, pinned: frozenset[AdapterRef]) -> None:
        self.count, self.pinned = count, pinned
        self.table = SlotTable(count, pinned={key.name for key in pinned})
        self.adapters: dict[AdapterRef, ModelSlot] = {}

    def evictable(self, key: AdapterRef, keep: frozenset[AdapterRef]) -> bool:
        each = self.adapters[key]
        idle = each.ready and not each.references and key not in self.pinned
        return idle and key not in keep

    @rule(key=st.sampled_from(KEYS), keep=KEPT)
    def reserve(self, key: AdapterRef, keep: frozenset[AdapterRef]) -> None:
        if key in self.adapters:
            with pytest.raises(ValueError, match=key.name):
                self.table.reserve(key, keep)
            return
        candidates = [other for other in self.adapters if self.evictable(other, keep)]
        place = self.table.reserve(key, keep)
        if len(self.adapters) < self.count:
            assert place is not None
            assert place[1] is None
            assert place[0] not in {each.slot for each in self.adapters.values()}
        elif not candidates:
            assert place is None
            return
        else:
            assert place is not None
            slot, evicted = place
            retiring = [other for other in candidates if self.adapters[other].retiring]
            assert evicted == (retiring or candidates)[0], "the retired one, else the least recently used"
            assert slot == self.adapters.pop(evicted).slot
        self.adapters[key] = ModelSlot(place[0])

    @precondition(lambda self: any(not each.ready for each in self.adapters.values()))
    @rule(data=st.data(), good=st.booleans())
    def end_load(self, data: st.DataObject, good: bool) -> None:
        key = data.draw(st.sampled_from([key for key, each in self.adapters.items() if not each.ready]))
        if good:
            self.table.mark_ready(key)
            self.adapters[key].ready = True
        else:
            self.table.free(key)
            del self.adapters[key]

    @rule(target=held, key=st.sampled_from(KEYS))
    def acquire(self, key: AdapterRef) -> object:
        slot = self.table.usable(key)
        each = self.adapters.get(key)
        assert (slot is not None) == (each is not None and each.ready and not each.retiring)
        if slot is None or each is None:
            return multiple()
        assert self.table.acquire(key) == slot == each.slot
        each.references += 1
        self.adapters[key] = self.adapters.pop(key)  # most recently used now
        return key

    @rule(key=consumes(held))
    def release(self, key: AdapterRef) -> None:
        self.table.release(key)
        self.adapters[key].references -= 1

    @rule(keep=KEPT)
    def retire(self, keep: frozenset[AdapterRef]) -> None:
        freeing = any(each.retiring or not each.ready for each in self.adapters.values())
        able = [k for k, each in self.adapters.items() if each.ready and k not in self.pinned and k not in keep]
        self.table.retire(keep)
        if not freeing and able:
            self.adapters[able[0]].retiring = True

    @rule(key=st.sampled_from(KEYS))
    def revive(self, key: AdapterRef) -> None:
        self.table.revive(key)
        if key in self.adapters:
            self.adapters[key].retiring = False

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: AdapterRef) -> None:
        each = self.adapters.get(key)
        idle = each is not None and each.ready and not each.references
        assert self.table.drop(key) == idle
        if idle:
            del self.adapters[key]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "table"):
            return
        slots = [each.slot for each in self.adapters.values()]
        assert len(set(slots)) == len(slots) <= self.count
        assert set(slots) <= set(range(self.count))
        for key in KEYS:
            assert self.table.holds(key) == (key in self.adapters)
        usable = [key for key, each in self.adapters.items() if each.ready and not each.retiring]
        assert self.table.resident() == tuple(usable)

    @precondition(lambda self: not self.pinned)
    @rule()
    def a_retired_slot_comes_free(self) -> None:
        """After all loads and batches have ended, a new adapter gets a slot, whatever happened before."""
        self.retire(frozenset())
        for key, each in self.adapters.items():
            if not each.ready:
                self.table.mark_ready(key)
                each.ready = True
        if not any(each.references for each in self.adapters.values()):
            assert self.table.reserve(AdapterRef("newcomer", "/n", "1")) is not None
            self.begin(self.count, self.pinned)


Slots.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSlots = Slots.TestCase


def test_a_release_without_an_acquire_raises() -> None:
    table = SlotTable(1)
    table.reserve(KEYS[0])
    table.mark_ready(KEYS[0])
    with pytest.raises(ValueError, match="adapter-0"):
        table.release(KEYS[0])


def test_a_busy_slot_is_retired_and_freed_by_its_last_reference() -> None:
    table = SlotTable(1)
    table.reserve(KEYS[0])
    table.mark_ready(KEYS[0])
    table.acquire(KEYS[0])
    assert table.reserve(KEYS[1]) is None
    table.retire()
    assert table.usable(KEYS[0]) is None
    assert table.reserve(KEYS[1]) is None
    table.release(KEYS[0])
    assert table.reserve(KEYS[1]) == (0, KEYS[0])
