"""Packed adapters in host memory, so that a load need not read the disk again."""

from collections import OrderedDict
from threading import Lock

from ranklet.replicas.adapters.packed import PackedAdapter
from ranklet.replicas.adapters.reference import AdapterRef


class HostCache:
    """An LRU cache with a byte budget. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()
        self._lock = Lock()
        self.nbytes = 0

    def get(self, ref: AdapterRef) -> PackedAdapter | None:
        with self._lock:
            if ref in self._entries:
                self._entries.move_to_end(ref)
            return self._entries.get(ref)

    def put(self, ref: AdapterRef, packed: PackedAdapter) -> None:
        """Keep an adapter and drop the least recently used ones; an adapter larger than the budget is not kept."""
        dropped = []  # their memory is freed outside the lock
        with self._lock:
            if ref in self._entries or packed.nbytes > self._max_bytes:
                return
            while self.nbytes + packed.nbytes > self._max_bytes:
                dropped.append(self._entries.popitem(last=False)[1])
                self.nbytes -= dropped[-1].nbytes
            self._entries[ref] = packed
            self.nbytes += packed.nbytes

    def drop(self, ref: AdapterRef) -> None:
        with self._lock:
            packed = self._entries.pop(ref, None)
            self.nbytes -= packed.nbytes if packed else 0

    def refs(self) -> tuple[AdapterRef, ...]:
        with self._lock:
            return tuple(self._entries)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._entries
