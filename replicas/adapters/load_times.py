"""Since when the loads of one engine run, or wait for a thread."""

from collections.abc import Callable

from ranklet.replicas.adapters.reference import AdapterRef

SLOT_PATIENCE_S = 2.0  # a load that reads for longer gives back its slot until its files are read


class LoadTimes:
    """The loads of one engine. Callers hold the engine's lock.

    Attributes:
        running: start of each running load.
        queued: since when each load waits for a free thread.
        copying: running loads that have read their files. They keep their slots.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.running: dict[AdapterRef, float] = {}
        self.queued: dict[AdapterRef, float] = {}
        self.copying: set[AdapterRef] = set()
        self._clock = clock

    def begin(self, ref: AdapterRef) -> None:
        self.running[ref] = self._clock()

    def end(self, ref: AdapterRef) -> None:
        del self.running[ref]
        self.copying.discard(ref)

    def slow(self) -> list[AdapterRef]:
        """Return the loads that have been reading for longer than SLOT_PATIENCE_S."""
        now_s = self._clock()
        return [
            ref
            for ref, since_s in self.running.items()
            if ref not in self.copying and now_s - since_s > SLOT_PATIENCE_S
        ]

    def overdue(self, timeout_s: float) -> list[AdapterRef]:
        """Return the loads that have been running or waiting for longer than `timeout_s`."""
        now_s = self._clock()
        return [ref for ref, since_s in {**self.queued, **self.running}.items() if now_s - since_s > timeout_s]
