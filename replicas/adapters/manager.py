"""Manages the adapters of one engine: which are in a slot, loading, or refused."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from threading import Condition
from time import monotonic

from ranklet.replicas.adapters.load_times import LoadTimes
from ranklet.replicas.adapters.loader import Loader, LoadOutcome, LostSlot
from ranklet.replicas.adapters.reference import (
    RECENTLY_USED_S,
    AdapterInfo,
    AdapterRef,
    AdapterReport,
    HeldAdapters,
    LoadRecord,
)
from ranklet.replicas.adapters.refusals import Refusals
from ranklet.replicas.adapters.row_claims import RowClaims
from ranklet.replicas.adapters.slots import SlotTable
from ranklet.replicas.adapters.waiting_request import WaitingRequest, fail_all
from ranklet.replicas.errors import InvalidAdapter, InvalidRequest, RankletError, StillLoading


class AdapterManager:
    """Loads adapters into the slots of one device on demand.

    It shares the engine's lock. Callers hold the lock, except for `_claim_slot`, `complete_load`, `expire`,
    `refuse_loads` and `stop`: these take it themselves, so that requests fail and futures resolve outside it.

    Args:
        changed: the engine's lock, notified when a load has ended.
        take_waiting: removes the requests that wait for an adapter from the engine's queue; called under the lock. The
            manager then fails them.
        on_load: called with the record of each load, without the lock.
        on_loading: called with the name of each adapter whose load starts, under the lock.
        on_evicted: called with the name of each adapter that lost its slot to another, under the lock.
    """

    def __init__(
        self, slots: int, loader: Loader, changed: Condition,
        take_waiting: Callable[[AdapterRef], Sequence[WaitingRequest]], *, on_load: Callable[[LoadRecord], None],
        on_loading: Callable[[str], None], on_evicted: Callable[[str], None], clock: Callable[[], float] = monotonic,
    ) -> None:  # fmt: skip
        self._table = SlotTable(slots, on_freed=loader.rows.free)
        self._rows = RowClaims(self._table, loader.rows, self._evict)
        self._loader = loader
        self._changed = changed
        self._take_waiting = take_waiting
        self._on_load, self._on_loading, self._on_evicted = on_load, on_loading, on_evicted
        self._clock = clock
        self._requested: dict[AdapterRef, Future[AdapterInfo]] = {}
        self._demand: Sequence[AdapterRef] = ()  # of the last `start_loads`
        self._loads = LoadTimes(clock)
        self._used: dict[AdapterRef, float] = {}  # last use of each adapter in a slot
        self._info: dict[AdapterRef, AdapterInfo] = {}
        self._refused = Refusals()
        self._stopped: RankletError | None = None

    # State

    def usable(self, ref: AdapterRef) -> bool:
        return self._table.usable(ref) is not None

    def slot_of(self, ref: AdapterRef) -> int | None:
        return self._table.usable(ref)

    def tier(self, ref: AdapterRef) -> str:
        """Return where the adapter is now: gpu, host or disk."""
        if self.usable(ref):
            return "gpu"
        return "host" if ref in self._loader.host else "disk"

    def refusal(self, ref: AdapterRef) -> RankletError | None:
        """Return the error that this revision was refused with, so that its files are not read for each request."""
        return self._refused.error(ref)

    def info(self, ref: AdapterRef) -> AdapterInfo:
        """Return the description of an adapter in a slot."""
        return self._info[ref]

    def held(self) -> HeldAdapters:
        resident = tuple(ref.name for ref in self._table.resident())
        loading = tuple(ref.name for ref in self._loads.running)
        reserved = sum(map(self._table.holds, self._loads.running))
        hosted = tuple(ref.name for ref in self._loader.host.refs())
        return HeldAdapters(resident, loading, hosted, reserved + len(self._recently_used()))

    @property
    def host_bytes(self) -> int:
        return self._loader.host.nbytes

    @property
    def pinned(self) -> Collection[str]:
        return self._table.pinned

    def report(self, references: Mapping[AdapterRef, int]) -> list[AdapterReport]:
        """Return every revision that is held, loading, refused or in use.

        Args:
            references: number of requests by the adapter that they wait for or run with.
        """
        refs = dict.fromkeys((*self._held(), *self._refused, *references))
        return [self._report(ref, references.get(ref, 0)) for ref in refs]

    def _report(self, ref: AdapterRef, references: int) -> AdapterReport:
        error = self._refused.error(ref)
        where = "refused" if error else "loading" if ref in self._loads.running else self.tier(ref)
        info, message = self._info.get(ref), error.message if error else None
        return AdapterReport(ref.name, ref.revision, where, references, info, message, ref.marks)

    # Batches

    def acquire_slots(self, refs: Sequence[AdapterRef | None]) -> list[int | None]:
        """Return the slots of a batch's adapters (None for the base model) and keep them until `release_slots`."""
        self._used.update(dict.fromkeys((ref for ref in refs if ref is not None), self._clock()))
        return [None if ref is None else self._table.acquire(ref) for ref in refs]

    def release_slots(self, refs: Sequence[AdapterRef | None]) -> None:
        for ref in refs:
            if ref is not None:
                self._table.release(ref)

    # Loads

    def request_load(self, ref: AdapterRef) -> Future[AdapterInfo]:
        """Request a load that no prompt waits for; the next `start_loads` starts it.

        Returns:
            A future of the adapter in its slot, or of the error that the load failed with.
        """
        if ref in self._requested:
            return self._requested[ref]
        future: Future[AdapterInfo] = Future()
        if self._stopped is not None:
            future.set_exception(self._stopped)
        elif ref in self._info:  # also if its slot is retiring
            future.set_result(self._info[ref])
        else:
            self._requested[ref] = future
        return future

    def start_loads(self, demand: Sequence[AdapterRef], using: Collection[AdapterRef | None] = ()) -> bool:
        """Start the loads that `request_load` and waiting prompts (`demand`, oldest first) need.

        Starts only loads that the loader can begin now; other adapters keep their slots until then. An adapter that is
        wanted earlier is never evicted for one that is wanted later.

        Args:
            using: adapters of a batch that is about to `acquire_slots`; they are not evicted.

        Returns:
            Whether a retiring adapter is usable again, so that more sequences are ready.
        """
        revived = False
        batch = {ref for ref in using if ref is not None}
        self._demand = demand
        wanted = [*self._requested, *demand]
        before, self._loads.queued = self._loads.queued, {}
        for i, ref in enumerate(wanted):
            if self._table.holds(ref):
                revived |= self._table.revive(ref)  # adapters that are wanted earlier have their slots already
                continue
            if ref in self._loads.running:
                continue
            if not self._loader.can_start(ref):
                self._loads.queued[ref] = before.get(ref, self._clock())
                continue
            place = self._table.reserve(ref, batch.union(wanted[:i]))
            if place is None:
                self._table.retire(wanted[:i])
                break
            self._start(ref, place[1])
        return revived

    def prefetch(self, ref: AdapterRef, needed: Collection[AdapterRef | None] = ()) -> None:
        """Start a load that no prompt waits for yet, if that evicts no adapter that is `needed` or was used recently.

        Does nothing if the load could not begin at once.
        """
        known = self._table.holds(ref) or ref in self._loads.running or ref in self._refused
        if known or not self._loader.can_start(ref):
            return
        place = self._table.reserve(ref, self._recently_used().union(each for each in needed if each is not None))
        if place is not None:
            self._start(ref, place[1])

    def _recently_used(self) -> set[AdapterRef]:
        now_s = self._clock()
        return {ref for ref, used_s in self._used.items() if now_s - used_s < RECENTLY_USED_S}

    def _start(self, ref: AdapterRef, evicted: AdapterRef | None) -> None:
        if evicted is not None:
            self._evict(evicted)
        self._loads.begin(ref)
        self._on_loading(ref.name)
        self._loader.start(ref, self._claim_slot, self.complete_load)

    def _evict(self, ref: AdapterRef) -> None:
        self._remove(ref)
        self._on_evicted(ref.name)

    def _remove(self, ref: AdapterRef) -> None:
        del self._info[ref]
        self._used.pop(ref, None)

    def _claim_slot(self, ref: AdapterRef, rows: int) -> int | None:
        """Return the slot of a load that has read its files; None if it gave the slot back and none is free.

        Returns None too if nothing waits for the adapter and its rows of tokens do not fit.
        """
        with self._changed:
            if not self._table.holds(ref):
                self._table.reserve(ref, keep=self._table.held())
            slot = self._table.slot_of(ref)
            wanted = [*self._requested, *self._demand]
            if slot is None or not self._rows.claim(ref, rows, wanted, self._recently_used()):
                return None
            self._loads.copying.add(ref)
            return slot

    def complete_load(self, outcome: LoadOutcome) -> None:
        """Record the end of a load and resolve its future. If it failed, fail the requests that wait for it.

        A load that found no slot begins again, in most cases from the host cache.
        """
        ref, result = outcome.ref, outcome.result
        with self._changed:
            self._record(ref, result)
            begins_again = isinstance(result, LostSlot)
            future = None if begins_again else self._requested.pop(ref, None)
            waiting = self._take_waiting(ref) if isinstance(result, RankletError) and not begins_again else ()
            self._changed.notify_all()
        self._on_load(outcome.record())
        if isinstance(result, RankletError):
            fail_all(waiting, result)
            if future is not None:
                future.set_exception(result)
        elif future is not None:
            future.set_result(result)

    def _record(self, ref: AdapterRef, result: AdapterInfo | RankletError) -> None:
        self._loads.end(ref)
        if isinstance(result, AdapterInfo):
            self._table.mark_ready(ref)
            self._used[ref] = self._clock()
            self._info[ref] = result
            return
        if self._table.holds(ref):
            self._table.free(ref)
        if isinstance(result, InvalidAdapter):
            self._refused.add(ref, result)

    def expire(self, timeout_s: float) -> None:
        """Fail requests whose adapter has been loading, or has waited for a thread, for longer than `timeout_s`.

        The load continues. A slow one gives back its slot, so that file systems that hang never hold all slots.
        """
        with self._changed:
            for ref in filter(self._table.holds, self._loads.slow()):
                self._table.free(ref)
                self._changed.notify_all()
            waiting = {ref: self._take_waiting(ref) for ref in self._loads.overdue(timeout_s)}
        for ref, requests in waiting.items():
            message = (
                f"adapter {ref.name!r}: expected it within {timeout_s:g} s (engine.load_timeout_s), but its files are "
                "still being read. Try again"
            )
            fail_all(requests, StillLoading(message))

    # Administration

    def pin(self, names: Collection[str]) -> None:
        """Replace the set of pinned adapters. A pinned adapter keeps its slot once it has one.

        Raises:
            InvalidRequest: no slot would be left for other adapters.
        """
        if len(names) >= self._table.count:
            raise InvalidRequest(
                f"pinned: expected fewer adapters than engine.slots ({self._table.count}), got {len(names)}",
                param="pinned",
            )
        self._table.pinned = set(names)

    def release_adapter(self, name: str, keep: str | None, references: Collection[AdapterRef]) -> bool:
        """Free the slots, host memory and refusals of an adapter, except for the revision `keep`.

        Args:
            references: adapters in use by requests; they, and running loads, are not freed.

        Returns:
            Whether nothing of it is left. If not, call again once its requests are answered.
        """
        for ref in [ref for ref in self._held_revisions(name) if ref.revision != keep]:
            self._loader.host.drop(ref)
            if self._table.drop(ref):
                self._remove(ref)
        self._refused.forget(name, keep)
        left = {*self._held_revisions(name), *(ref for ref in references if ref.name == name)}
        return not any(ref.revision != keep for ref in left)

    def _held_revisions(self, name: str) -> set[AdapterRef]:
        return {ref for ref in self._held() if ref.name == name}

    def _held(self) -> tuple[AdapterRef, ...]:
        return (*self._table.held(), *self._loads.running, *self._loader.host.refs())

    def refuse_loads(self, error: RankletError) -> None:
        """Resolve all requested loads, and those requested later, with an error."""
        with self._changed:
            self._stopped = error
            futures = list(self._requested.values())
            self._requested.clear()
        for future in futures:
            future.set_exception(error)

    def stop(self) -> None:
        self._loader.stop()
