"""Which adapters are in a slot, on their way to one, or refused. Every method is called under the engine's lock."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

from ranklet.replicas.adapters.loader import Loader, LoadOutcome
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef
from ranklet.replicas.adapters.slots import SlotTable
from ranklet.replicas.engine.stats import AdapterReport
from ranklet.replicas.errors import InvalidAdapter, RankletError

_REMEMBERED_REFUSALS = 256
LATELY_S = 30.0


@dataclass
class AdapterManager:
    """The slots of one device and the loads that fill them.

    Attributes:
        loaded: called on a loader thread, without the lock, when a load has ended; it must call `settle` with it.
        evicted: called with the name of an adapter that lost its slot.
    """

    table: SlotTable
    loader: Loader
    loaded: Callable[[LoadOutcome], None]
    evicted: Callable[[str], None]
    asked: dict[AdapterRef, Future[AdapterInfo]] = field(default_factory=dict)  # loads that no prompt waits for
    _began: dict[AdapterRef, float] = field(default_factory=dict)  # loads under way, since when
    _queued: dict[AdapterRef, float] = field(default_factory=dict)  # loads that wait for their turn, since when
    _used: dict[AdapterRef, float] = field(default_factory=dict)  # those in a slot, when last
    _info: dict[AdapterRef, AdapterInfo] = field(default_factory=dict)
    _refused: OrderedDict[AdapterRef, RankletError] = field(default_factory=OrderedDict)

    def usable(self, ref: AdapterRef) -> bool:
        """Whether a batch may use the adapter now."""
        return self.table.usable(ref) is not None

    def refusal(self, ref: AdapterRef) -> RankletError | None:
        """Why this revision was refused, if it was: its files are not read again for every request."""
        error = self._refused.get(ref)
        # Raised again for each request, it would gather their frames, and the prompts in them, for ever.
        return error and error.with_traceback(None)

    def tier(self, ref: AdapterRef) -> str:
        """Where the adapter is now: gpu, host or disk."""
        if self.usable(ref):
            return "gpu"
        return "host" if ref in self.loader.host else "disk"

    def coming(self) -> tuple[AdapterRef, ...]:
        """Adapters on their way to a slot."""
        return tuple(self._began)

    def taken(self) -> int:
        """Slots with an adapter on its way, or one that was used of late; the others cost nobody anything to evict."""
        return len(self._began) + len(self._lately())

    def _lately(self) -> set[AdapterRef]:
        now_s = monotonic()
        return {ref for ref, since_s in self._used.items() if now_s - since_s < LATELY_S}

    def acquire(self, refs: Sequence[AdapterRef | None]) -> list[int | None]:
        """The slots of a batch's adapters, each held until `release`."""
        self._used.update(dict.fromkeys((ref for ref in refs if ref is not None), monotonic()))
        return [None if ref is None else self.table.acquire(ref) for ref in refs]

    def release(self, refs: Sequence[AdapterRef | None]) -> None:
        """Undo `acquire`."""
        for ref in refs:
            if ref is not None:
                self.table.release(ref)

    def ask(self, ref: AdapterRef) -> Future[AdapterInfo]:
        """Want an adapter in a slot, ahead of those that prompts wait for."""
        if ref in self._info:  # retiring ones too: no load would end that could answer
            known: Future[AdapterInfo] = Future()
            known.set_result(self._info[ref])
            return known
        return self.asked.setdefault(ref, Future())

    def bring(self, demand: Sequence[AdapterRef], using: Collection[AdapterRef | None] = ()) -> None:
        """Start the loads that `demand` (oldest first) and `ask` need; older adapters are never evicted for younger.

        No more than begin at once: those in the slots serve until then.

        Args:
            using: adapters of a batch that is about to `acquire` them; none of them is evicted.
        """
        proposed = {ref for ref in using if ref is not None}
        wanted = [*self.asked, *demand]
        before, self._queued = self._queued, {}
        for i, ref in enumerate(wanted):
            if self.table.holds(ref):
                self.table.revive(ref)  # those before it have their slots: it need not leave
                continue
            if not self.loader.can_start(ref):
                self._queued[ref] = before.get(ref) or monotonic()
                continue
            place = self.table.reserve(ref, proposed.union(wanted[:i]))
            if place is None:
                self.table.retire(wanted[:i])
                return
            self._start(ref, *place)

    def offer(self, ref: AdapterRef, needed: Collection[AdapterRef | None] = ()) -> None:
        """Start a load that no prompt waits for, if it costs nobody anything: it can begin at once, and there is a slot
        that is free, or whose adapter is neither `needed` nor was used of late. Otherwise nothing happens: who offers
        does not see what else is wanted here.
        """
        if self.table.holds(ref) or ref in self._refused or not self.loader.can_start(ref):
            return
        place = self.table.reserve(ref, self._lately().union(each for each in needed if each is not None))
        if place is not None:
            self._start(ref, *place)

    def _start(self, ref: AdapterRef, slot: int, evicted: AdapterRef | None) -> None:
        if evicted is not None:
            del self._info[evicted]
            self._used.pop(evicted, None)
            self.evicted(evicted.name)
        self._began[ref] = monotonic()
        self.loader.start(ref, slot, self.loaded)

    def forget(self, name: str, keep: str | None = None) -> None:
        """Give up what is held of an adapter, but for the revision `keep`; what is in use or loading stays for now."""
        for ref in [ref for ref in self.revisions(name) if ref.revision != keep]:
            self.loader.host.drop(ref)
            if self.table.drop(ref):
                del self._info[ref]
                self._used.pop(ref, None)
        for ref in [ref for ref in self._refused if ref.name == name and ref.revision != keep]:
            del self._refused[ref]

    def revisions(self, name: str) -> set[AdapterRef]:
        """All that is held of an adapter, in slots or in host memory."""
        return {ref for ref in (*self.table.held(), *self.loader.host.refs()) if ref.name == name}

    def report(self) -> list[AdapterReport]:
        """Every revision that is held, on its way or refused, its references left out."""
        held = {*self.table.held(), *self.loader.host.refs(), *self._began}
        found = [
            AdapterReport(ref.name, ref.revision, self._where(ref), info=self._info.get(ref), marks=ref.marks)
            for ref in held
        ]
        refused = [
            AdapterReport(ref.name, ref.revision, "refused", error=error.message, marks=ref.marks)
            for ref, error in self._refused.items()
        ]
        return found + refused

    def _where(self, ref: AdapterRef) -> str:
        return "loading" if ref in self._began else self.tier(ref)

    def overdue(self, after_s: float) -> frozenset[AdapterRef]:
        """Adapters that have been on their way for longer."""
        now_s = monotonic()
        since = {**self._queued, **self._began}
        return frozenset(ref for ref, since_s in since.items() if now_s - since_s > after_s)

    def settle(self, outcome: LoadOutcome) -> tuple[Future[AdapterInfo] | None, AdapterInfo | None]:
        """Enter a finished load; returns who asked for it and what they get (None: `outcome.error`)."""
        ref, packed, error = outcome.ref, outcome.packed, outcome.error
        asked = self.asked.pop(ref, None)
        self._began.pop(ref, None)
        if packed is not None:
            self.table.loaded(ref)
            self._used[ref] = monotonic()
            self._info[ref] = AdapterInfo(ref.name, ref.revision, packed.adapter_rank, packed.modules, packed.nbytes)
            return asked, self._info[ref]
        self.table.failed(ref)
        if isinstance(error, InvalidAdapter):
            self._refused[ref] = error
            while len(self._refused) > _REMEMBERED_REFUSALS:
                self._refused.popitem(last=False)
        return asked, None
