"""Bringing adapters from disk through the host cache into slots, on threads of its own."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

from ranklet.replicas.adapters.packed import PackedAdapter, pack
from ranklet.replicas.adapters.pinned_memory import PinnedMemory, pageable
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.verify import ExpectedModules, read_adapter
from ranklet.replicas.errors import InternalError, RankletError

READERS = 8  # loads from disk at once: a folder that hangs takes one of them, and holds up no other load
COPIERS = 2  # loads from the host cache, which never wait for a disk


class HostCache:
    """Packed adapters in host memory, least recently used out first, within a byte budget. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()
        self._lock = Lock()
        self.nbytes = 0

    def get(self, key: AdapterRef) -> PackedAdapter | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: AdapterRef, packed: PackedAdapter) -> None:
        """Keep an adapter, making room; one larger than the whole budget is not kept."""
        gone = []  # their memory is given back behind the lock
        with self._lock:
            if key in self._entries or packed.nbytes > self._max_bytes:
                return
            while self.nbytes + packed.nbytes > self._max_bytes:
                gone.append(self._entries.popitem(last=False)[1])
                self.nbytes -= gone[-1].nbytes
            self._entries[key] = packed
            self.nbytes += packed.nbytes

    def drop(self, key: AdapterRef) -> None:
        with self._lock:
            packed = self._entries.pop(key, None)
            self.nbytes -= packed.nbytes if packed else 0

    def refs(self) -> tuple[AdapterRef, ...]:
        with self._lock:
            return tuple(self._entries)

    def __contains__(self, key: AdapterRef) -> bool:
        return key in self._entries


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What became of one load. `tier` is where the adapter was found: host or disk."""

    ref: AdapterRef
    tier: str
    seconds: float
    packed: PackedAdapter | None  # None if it was refused: then `error` says why
    error: RankletError | None = None


class Loader:
    """Loads adapters into reserved slots without holding up any batch."""

    def __init__(self, pool: AdapterPool, expected: ExpectedModules, host_cache_bytes: int) -> None:
        self.host = HostCache(host_cache_bytes)
        self._pool = pool
        self._expected = expected
        self._allocate = PinnedMemory(READERS).allocate if pool.device.type == "cuda" else pageable
        self._lock = Lock()
        self._reading = self._copying = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ranklet-read")
        self._copiers = ThreadPoolExecutor(COPIERS, thread_name_prefix="ranklet-copy")

    def can_start(self, ref: AdapterRef) -> bool:
        """Whether a load would begin at once. One that waited for its turn would keep a slot empty meanwhile."""
        return self._reading < READERS if ref not in self.host else self._copying < COPIERS

    def start(self, ref: AdapterRef, slot: int, done: Callable[[LoadOutcome], None]) -> None:
        """Load an adapter into a slot; `done` is called on a loader thread, whatever happens."""
        hosted = ref in self.host
        self._count(hosted, 1)

        def run() -> None:
            outcome = self._load(ref, slot)
            self._count(hosted, -1)
            done(outcome)

        (self._copiers if hosted else self._readers).submit(run)

    def _count(self, hosted: bool, change: int) -> None:
        with self._lock:
            if hosted:
                self._copying += change
            else:
                self._reading += change

    def _load(self, ref: AdapterRef, slot: int) -> LoadOutcome:
        began = perf_counter()
        packed = self.host.get(ref)
        tier = "host" if packed is not None else "disk"
        error: RankletError | None = None
        try:
            if packed is None:
                packed = self._read(ref)
                self.host.put(ref, packed)
            self._pool.load(slot, packed)
        except RankletError as refused:
            error = refused
        except Exception as defect:  # a load must never take its thread, or the engine, with it
            error = InternalError(f"adapter {ref.name!r}: loading failed: {type(defect).__name__}: {defect}")
        return LoadOutcome(ref, tier, perf_counter() - began, packed if error is None else None, error)

    def _read(self, ref: AdapterRef) -> PackedAdapter:
        return pack(read_adapter(ref, self._expected, self._allocate), self._pool.dtype, self._allocate)

    def stop(self) -> None:
        """Finish the loads under way and start no more."""
        for threads in (self._copiers, self._readers):
            threads.shutdown(cancel_futures=True)
