"""What an engine tells the outside: records pushed to a `Listener`, and a snapshot polled from it."""

from dataclasses import dataclass

from ranklet.replicas.adapters.reference import AdapterInfo


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
class LoadRecord:
    """One adapter brought into a slot (or refused: `error` set). `tier` is where it was found: host or disk."""

    adapter: str
    rank: int
    tier: str
    seconds: float
    error: str | None = None


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


@dataclass(frozen=True, slots=True)
class HeldAdapters:
    """Names of the adapters that an engine holds at one moment; cheaper than a snapshot of a long queue."""

    resident: tuple[str, ...] = ()  # ready in a slot, most recently used last
    coming: tuple[str, ...] = ()  # on their way to one
    hosted: tuple[str, ...] = ()  # in the host cache
    taken: int = 0  # slots with an adapter on its way, or one that was used of late


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """One revision of an adapter as an engine has it.

    Attributes:
        where: gpu, host, loading or refused.
        references: requests that wait for it or run with it.
        info: what was found when it was loaded, None if it is in no slot.
        error: why it was refused.
        marks: of the files that it was read from.
    """

    name: str
    revision: str
    where: str
    references: int = 0
    info: AdapterInfo | None = None
    error: str | None = None
    marks: str = ""


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
