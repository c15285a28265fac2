"""Records that an engine pushes to a `Listener`, and snapshots of its state."""

from dataclasses import dataclass

from ranklet.replicas.adapters.reference import HeldAdapters, LoadRecord


@dataclass(frozen=True)
class BatchRecord:
    """One step that ran.

    Attributes:
        requests_by_adapter: sequences by adapter name; "" is the base model.
        compute_s: how long the step had the device, which runs one step at a time.
    """

    requests_by_adapter: dict[str, int]
    tokens_by_adapter: dict[str, int]
    backend: str
    queue_waits_s: list[float]
    compute_s: float

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_adapter.values())

    @property
    def adapters(self) -> int:
        return sum(1 for name in self.requests_by_adapter if name)


@dataclass(frozen=True)
class Snapshot:
    """An engine at one moment; cheap enough to take several times a second.

    Attributes:
        resident: names of adapters in slots, most recently used last.
        hosted: names of adapters in the host cache.
    """

    resident: tuple[str, ...]
    hosted: tuple[str, ...]
    waiting_requests: int
    waiting_tokens: int
    running_requests: int
    waiting_adapters: tuple[str, ...]
    running_adapters: tuple[str, ...]
    slots: int
    pool_bytes: int
    host_bytes: int
    pinned: tuple[str, ...] = ()


class Listener:
    """Receives an engine's records on the engine's threads. Methods must be quick and must not raise."""

    def batch(self, record: BatchRecord) -> None:
        """Receive a step that was answered."""

    def load(self, record: LoadRecord) -> None:
        """Receive an adapter that was loaded into a slot, or refused."""

    def loading(self, adapter: str) -> None:
        """Receive the name of an adapter whose load starts."""

    def evicted(self, adapter: str) -> None:
        """Receive the name of an adapter that lost its slot to another."""

    def tier_hit(self, tier: str) -> None:
        """Receive where a request found its adapter: gpu, host or disk."""

    def cancelled(self, requests: int) -> None:
        """Receive how many requests were dropped before they reached the device."""

    def holdings_changed(self, held: HeldAdapters) -> None:
        """Receive what the engine holds, at each change. Only an `EngineProcess` calls it."""
