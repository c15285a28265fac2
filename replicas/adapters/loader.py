"""Loads adapters from disk or from the host cache into slots, on threads of its own."""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.host_cache import HostCache
from ranklet.replicas.adapters.mounts import mount_of
from ranklet.replicas.adapters.packed import PackedAdapter, pack
from ranklet.replicas.adapters.pinned_memory import PinnedMemory, pageable
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, LoadRecord
from ranklet.replicas.adapters.row_pool import RowPool
from ranklet.replicas.adapters.verify import read_adapter
from ranklet.replicas.errors import InternalError, RankletError, StillLoading

logger = logging.getLogger(__name__)

READERS = 8  # concurrent loads from one mounted file system, which may hang
MAX_READERS = 64  # of all file systems
_FEW_SLOTS = 2
ClaimSlot = Callable[[AdapterRef, int], int | None]
COPIERS = 2  # concurrent loads from the host cache, which never wait for a disk


class LostSlot(StillLoading):
    """A load that took long gave its slot back, and none is free. It begins again."""


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """One finished load. `tier` is where the adapter was found: host or disk."""

    ref: AdapterRef
    tier: str
    seconds: float
    result: AdapterInfo | RankletError

    def record(self) -> LoadRecord:
        if isinstance(self.result, RankletError):
            return LoadRecord(self.ref.name, 0, self.tier, self.seconds, self.result.code)
        return LoadRecord(self.ref.name, self.result.rank, self.tier, self.seconds)


class Loader:
    """Loads adapters into reserved slots while batches run on the others."""

    def __init__(self, pool: AdapterPool, expected: ExpectedModules, host_cache_bytes: int) -> None:
        self.host = HostCache(host_cache_bytes)
        self._pool = pool
        self._expected = expected
        self._allocate = PinnedMemory(READERS).allocate if pool.device.type == "cuda" else pageable
        self._lock = Lock()
        self._reading: Counter[str] = Counter()  # by mount point
        self._copying = 0
        # Loads hold their slots for a while: a file system that hangs must leave one to others.
        self._readers_of_mount = min(READERS, pool.slots - 1) if pool.slots > _FEW_SLOTS else READERS
        self._readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="ranklet-read")
        self._copiers = ThreadPoolExecutor(COPIERS, thread_name_prefix="ranklet-copy")

    @property
    def rows(self) -> RowPool:
        """The rows of tokens of all slots."""
        return self._pool.rows

    def can_start(self, ref: AdapterRef) -> bool:
        """Whether a thread is free for a load. A load that waited for one would keep its slot empty."""
        if ref in self.host:
            return self._copying < COPIERS
        return self._reading[mount_of(ref.path)] < self._readers_of_mount and self._reading.total() < MAX_READERS

    def start(self, ref: AdapterRef, claim: ClaimSlot, done: Callable[[LoadOutcome], None]) -> None:
        """Load an adapter into the slot that `claim` returns.

        `done` is called on a loader thread, unless the loader stops before one is free.

        Args:
            claim: called on a loader thread once the files are read, with the number of rows of tokens that the
                adapter needs. Without a slot, the load fails with LostSlot.
        """
        packed = self.host.get(ref)  # here, since the cache may drop it before a thread runs
        mount = mount_of(ref.path) if packed is None else None
        self._count(mount, 1)

        def run() -> None:
            outcome = self._load(ref, packed, claim)
            self._count(mount, -1)
            done(outcome)

        (self._copiers if mount is None else self._readers).submit(run)

    def _count(self, mount: str | None, change: int) -> None:
        with self._lock:
            if mount is None:
                self._copying += change
            else:
                self._reading[mount] += change

    def _load(self, ref: AdapterRef, packed: PackedAdapter | None, claim: ClaimSlot) -> LoadOutcome:
        began_s = perf_counter()
        tier = "host" if packed is not None else "disk"
        result: AdapterInfo | RankletError
        try:
            if packed is None:
                packed = self._read(ref)
            slot = claim(ref, packed.rows.taken)
            if slot is None:
                raise LostSlot(f"adapter {ref.name!r}: its files are read, but no slot is free")
            self._pool.load(slot, packed)
            result = AdapterInfo(
                ref.name, ref.revision, packed.adapter_rank, packed.modules, packed.nbytes, packed.end_ids,
                packed.notes, packed.head, packed.dense, ref.invocation,
                packed.rows.vocab(self._expected.architecture.vocab),
            )  # fmt: skip
        except RankletError as error:
            result = error
        except Exception as error:  # a failed load must not end its thread
            result = InternalError(f"adapter {ref.name!r}: loading failed: {type(error).__name__}: {error}")
        return LoadOutcome(ref, tier, perf_counter() - began_s, result)

    def _read(self, ref: AdapterRef) -> PackedAdapter:
        adapter = read_adapter(ref, self._expected, self._allocate)
        for note in adapter.notes:
            logger.warning("adapter %r: %s", ref.name, note)
        packed = pack(adapter, self._pool.dtype, self._allocate)
        self.host.put(ref, packed)
        return packed

    def stop(self) -> None:
        """Wait for the running loads and start no more."""
        for threads in (self._copiers, self._readers):
            threads.shutdown(cancel_futures=True)
