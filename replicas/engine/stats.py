"""What an engine tells the outside: records pushed to a `Listener`, and a snapshot polled from it."""

from dataclasses import dataclass

from ranklet.replicas.adapters.reference import HeldAdapters, LoadRecord


@dataclass(frozen=True)
class BatchRecord:
    """One batch that ran. Times in seconds; `compute_s` is how long it had the device, which runs one at a time."""

    requests_by_adapter: dict[str, int]  # "" is the base model
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
    """An engine at one moment; cheap enough to take several times a second."""

    resident: tuple[str, ...]  # adapter names ready in a slot, most recently used last
    hosted: tuple[str, ...]  # adapter names in the host cache
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
    """Receives an engine's records, on the engine's threads: methods must be quick and must not raise."""

    def batch(self, record: BatchRecord) -> None:
        """A batch was answered."""

    def load(self, record: LoadRecord) -> None:
        """An adapter was loaded into a slot, or refused."""

    def evicted(self, adapter: str) -> None:
        """An adapter lost its slot to another."""

    def holdings_changed(self, held: HeldAdapters) -> None:
        """The adapters that the engine holds have changed, or the order of their use has."""

    def tier_hit(self, tier: str) -> None:
        """A request arrived for an adapter found in `tier`: gpu, host or disk."""

    def cancelled(self, requests: int) -> None:
        """Requests were dropped before they reached the device, because their client had gone."""
