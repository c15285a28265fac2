"""Takes rows of tokens from idle adapters for those of an adapter that is about to be copied into its slot."""

from collections.abc import Callable, Collection, Sequence

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.row_pool import RowPool, RowsTaken
from ranklet.replicas.adapters.slots import SlotTable


class RowClaims:
    """Callers hold the engine's lock.

    Args:
        slots: frees a slot's rows in the pool when its adapter loses the slot.
        on_evicted: called with each adapter that lost its slot for the rows of another.
    """

    def __init__(self, slots: SlotTable, pool: RowPool, on_evicted: Callable[[AdapterRef], None]) -> None:
        self._slots = slots
        self._pool = pool
        self._on_evicted = on_evicted

    def claim(self, ref: AdapterRef, needed: int, wanted: Sequence[AdapterRef], recent: Collection[AdapterRef]) -> bool:
        """Give an adapter's slot the rows that it needs, if need be those of idle adapters, which lose their slots.

        Evicts no adapter that is wanted earlier. For an adapter that nothing waits for, evicts none that is wanted or
        was used recently. Evicts no adapter without rows, and none if all together have too few.

        Args:
            needed: number of rows.
            wanted: adapters that requests wait for, the first to be served first.
            recent: adapters that were used recently.

        Returns:
            False if nothing waits for the adapter and the rows do not fit.

        Raises:
            RowsTaken: the rows of adapters in use leave too few for one that requests wait for.
        """
        is_wanted = ref in wanted
        keep = wanted[: wanted.index(ref)] if is_wanted else {*wanted, *recent}
        available = self._pool.free_rows + self._rows_of(ref)
        evicted = []
        for each in self._slots.idle(keep) if needed > available else ():
            own = self._rows_of(each)
            if own and needed > available:
                evicted.append(each)
                available += own
        if needed > available:
            if is_wanted:
                raise RowsTaken(needed, available, self._pool.capacity)
            return False
        for each in evicted:
            self._slots.free(each)
            self._on_evicted(each)
        self._pool.claim(self._slot_of(ref), needed)
        return True

    def _rows_of(self, ref: AdapterRef) -> int:
        return self._pool.rows_of(self._slot_of(ref))

    def _slot_of(self, ref: AdapterRef) -> int:
        slot = self._slots.slot_of(ref)
        assert slot is not None
        return slot
