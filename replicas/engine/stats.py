"""Records that an engine pushes to a `Listener`, and snapshots of its state."""

from dataclasses import dataclass, field

from ranklet.replicas.adapters.reference import HeldAdapters, LoadRecord


@dataclass(frozen=True)
class CacheRoom:
    """What routers need to know of a key-value cache.

    Attributes:
        free_tokens: that free and cached pages can hold.
        kept_s: pages that were used within this time are still there; infinite if none was evicted.
    """

    free_tokens: int
    kept_s: float


@dataclass(frozen=True)
class BatchRecord:
    """A step that has run.

    Attributes:
        prompts_by_adapter: number of prompts whose first output this step computed, by adapter name; "" is the base
            model.
        tokens_by_adapter: tokens of prompts, and tokens that were computed again after a preemption.
        queue_waits_s: wait of each sequence from its arrival to its first step.
        compute_s: device time of the step. The device runs one step at a time.
        generated_by_adapter: tokens that texts were given.
        room: None if the engine generates no text.
    """

    prompts_by_adapter: dict[str, int]
    tokens_by_adapter: dict[str, int]
    backend: str
    queue_waits_s: list[float]
    compute_s: float
    generated_by_adapter: dict[str, int] = field(default_factory=dict)
    room: CacheRoom | None = None

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_adapter.values())

    @property
    def adapters(self) -> int:
        return len({*self.tokens_by_adapter, *self.generated_by_adapter} - {""})

    @property
    def generated(self) -> int:
        return sum(self.generated_by_adapter.values())


@dataclass(frozen=True)
class KvCacheState:
    """State of the key-value cache. The counts of events are since the start.

    Attributes:
        used_pages: pages of sequences; a shared page counts once.
        cached_pages: pages that no sequence uses and that later sequences may share.
        sequences: number of sequences with pages.
        preemptions: how often a sequence lost its pages to another.
        asked_tokens: tokens that sequences looked up in the prefix cache when they started.
        shared_tokens: tokens that they found there.
        evicted_pages: cached pages that were given to other tokens.
    """

    pages: int
    used_pages: int
    cached_pages: int
    sequences: int
    preemptions: int
    asked_tokens: int
    shared_tokens: int
    evicted_pages: int


@dataclass(frozen=True)
class Snapshot:
    """State of an engine. Taking one is cheap enough for several times a second.

    Attributes:
        resident: names of adapters in slots, most recently used last.
        hosted: names of adapters in the host cache.
        waiting_requests: requests with a prompt that no step has begun, or that was preempted.
        waiting_sequences: prompts and choices that no step has begun, or that were preempted.
        running_requests: requests with a prompt or a text in a step, or between two of its steps.
        kv_cache: None if the engine generates no text.
    """

    resident: tuple[str, ...]
    hosted: tuple[str, ...]
    waiting_requests: int
    waiting_tokens: int
    waiting_sequences: int
    running_requests: int
    waiting_adapters: tuple[str, ...]
    running_adapters: tuple[str, ...]
    slots: int
    pool_bytes: int
    host_bytes: int
    pinned: tuple[str, ...] = ()
    kv_cache: KvCacheState | None = None


class Listener:
    """Receives events of an engine on the engine's threads. Methods must be quick and must not raise."""

    def batch(self, record: BatchRecord) -> None: ...

    def load(self, record: LoadRecord) -> None: ...

    def loading(self, adapter: str) -> None: ...

    def evicted(self, adapter: str) -> None:
        """Receive the name of an adapter that lost its slot to another."""

    def tier_hit(self, tier: str) -> None:
        """Receive where the adapter of a new request was: gpu, host or disk."""

    def cancelled(self, prompts: int) -> None:
        """Receive the number of prompts whose client cancelled before they were computed."""

    def holdings_changed(self, held: HeldAdapters) -> None:
        """Receive the adapters that the engine holds, at each change. Only `EngineProcess` calls it."""

    def pieces(self, gateway: str, data: bytes) -> None:
        """Receive the pieces of texts that a step made for one gateway. Only `EngineProcess` calls it."""
