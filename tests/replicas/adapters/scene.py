"""An adapter manager whose tests play the batches, set the clock and decide when a load completes."""

import queue
from collections.abc import Callable
from threading import Condition

from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.loader import ClaimSlot, Loader, LoadOutcome
from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterRef, LoadRecord
from ranklet.replicas.errors import RankletError
from tests.replicas.asking import PATIENCE_S


class HoldingLoader(Loader):
    """Keeps the outcomes of loads until the test completes them."""

    def __init__(self, pool: AdapterPool, expectation: ExpectedModules) -> None:
        super().__init__(pool, expectation, 1 << 30)
        self.outcomes: queue.Queue[LoadOutcome] = queue.Queue()

    def start(self, ref: AdapterRef, claim: ClaimSlot, done: Callable[[LoadOutcome], None]) -> None:
        super().start(ref, claim, self.outcomes.put)


class Waiting:
    """A request that waits for an adapter."""

    def __init__(self) -> None:
        self.error: RankletError | None = None

    def fail(self, error: RankletError) -> None:
        self.error = error


class Scene:
    """A manager, the requests that wait for it, and a clock that the test sets."""

    def __init__(self, pool: AdapterPool, expectation: ExpectedModules, slots: int) -> None:
        self.loader = HoldingLoader(pool, expectation)
        self.waiting: dict[AdapterRef, list[Waiting]] = {}
        self.evicted: list[str] = []
        self.records: list[LoadRecord] = []
        self.now_s = 0.0
        self.manager = AdapterManager(
            slots, self.loader, Condition(), lambda ref: self.waiting.pop(ref, []),
            on_load=self.records.append, on_loading=lambda name: None, on_evicted=self.evicted.append,
            clock=lambda: self.now_s,
        )  # fmt: skip

    def complete(self) -> LoadRecord:
        """Complete the next load."""
        self.manager.complete_load(self.loader.outcomes.get(timeout=PATIENCE_S))
        return self.records[-1]

    def load(self, ref: AdapterRef) -> None:
        """Load an adapter that a prompt needs."""
        self.manager.start_loads([ref])
        self.complete()

    def has_slot(self, ref: AdapterRef) -> bool:
        held = self.manager.held()
        return ref.name in (*held.resident, *held.loading)
