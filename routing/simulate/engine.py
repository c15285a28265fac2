"""A simulated replica: slots, loads, and one batch at a time with the oldest prompts first."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ranklet.routing.hint import TextHint


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a replica, as measured on one H200: tests/bench/results/engine-h200.json and cluster-4xh200.json.

    Loads have become faster since (loads-h200.json): 0.11 s with the hash of the files, 0.005 s without.
    """

    tokens_per_s: float = 328_000.0  # of large batches with LoRA
    launch_s: float = 0.0025  # of any batch
    batch_tokens: int = 30_720
    disk_s: float = 0.15  # load of an adapter from disk into a slot
    host_s: float = 0.02  # load from the host cache
    readers: int = 8


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One prompt for one adapter (None: base model)."""

    id: int
    adapter: str | None
    tokens: int
    gateway: int
    arrived_s: float
    began_s: float = 0.0
    hit: bool = True

    def hint(self) -> TextHint | None:
        """Return what the router may know of the texts that the request makes; None if it makes none."""
        return None

    def restart(self) -> None:
        """Forget what a replica did for the request, which is lost."""


@dataclass(slots=True)
class SimulatedEngine:
    """One replica. Its methods get the simulated time and return durations, for which the simulator waits.

    Attributes:
        max_hosted: adapters in the host cache.
        recently_used_s: a prefetch does not evict adapters that were used within this time.
        resident: adapters in slots and when each was last used, the least recently used first.
        hosted: adapters in the host cache, the least recently loaded first.
        queued_tokens: waiting and running.
        received_tokens: by gateway.
        loads: loads started so far.
        changes: changes of `resident` so far.
        waiting: requests in the queue by adapter, in order of arrival.
    """

    slots: int
    max_hosted: int
    speed: Speed
    recently_used_s: float
    resident: "OrderedDict[str, float]" = field(default_factory=OrderedDict)
    hosted: "OrderedDict[str, None]" = field(default_factory=OrderedDict)
    loading: set[str] = field(default_factory=set)
    running: list[SimulatedRequest] = field(default_factory=list)
    queue: "deque[SimulatedRequest]" = field(default_factory=deque)
    queued_tokens: int = 0
    received_tokens: "Counter[int]" = field(default_factory=Counter)
    done_tokens: int = 0
    busy_s: float = 0.0
    loads: int = 0
    changes: int = 0
    waiting: "Counter[str]" = field(default_factory=Counter)

    @property
    def open_requests(self) -> int:
        return len(self.queue) + len(self.running)

    @property
    def outstanding(self) -> float:
        """Return the work of all open requests."""
        return self.queued_tokens

    def add_request(self, request: SimulatedRequest) -> None:
        self.queue.append(request)
        self.queued_tokens += request.tokens
        self.received_tokens[request.gateway] += request.tokens
        if request.adapter is not None:
            self.waiting[request.adapter] += 1
            request.hit = request.adapter in self.resident

    def start_loads(self) -> list[tuple[str, float]]:
        """Start loads for the queue, oldest first. Returns each adapter and the duration of its load."""
        started: list[tuple[str, float]] = []
        for name in self.waiting:
            if len(self.loading) >= self.speed.readers:
                break
            if name not in self.resident and name not in self.loading:
                if not self._reserve_slot(lambda other: other not in self.waiting):
                    break
                started.append(self._start_load(name))
        return started

    def prefetch(self, name: str, now_s: float) -> list[tuple[str, float]]:
        """Start a load ahead of requests, unless it would evict an adapter in use. Returns as `start_loads`."""
        if name in self.resident or name in self.loading or len(self.loading) >= self.speed.readers:
            return []
        has_slot = self._reserve_slot(
            lambda other: other not in self.waiting and now_s - self.resident[other] >= self.recently_used_s
        )
        return [self._start_load(name)] if has_slot else []

    def _start_load(self, name: str) -> tuple[str, float]:
        self.loading.add(name)
        self.loads += 1
        return name, self.speed.host_s if name in self.hosted else self.speed.disk_s

    def _reserve_slot(self, may_evict: Callable[[str], bool]) -> bool:
        if len(self.resident) + len(self.loading) < self.slots:
            return True
        used = {request.adapter for request in self.running}
        victim = next((name for name in self.resident if name not in used and may_evict(name)), None)
        if victim is None:
            return False
        del self.resident[victim]
        self.changes += 1
        return True

    def used_slots(self, now_s: float) -> int:
        recent = sum(now_s - used_s < self.recently_used_s for used_s in self.resident.values())
        return len(self.loading) + recent

    def complete_load(self, name: str, now_s: float) -> None:
        self.loading.discard(name)
        self.resident[name] = now_s
        self.changes += 1
        self.hosted[name] = None
        self.hosted.move_to_end(name)
        if len(self.hosted) > self.max_hosted:
            self.hosted.popitem(last=False)

    def start_batch(self, now_s: float) -> float | None:
        """Start the next batch. Returns its duration, or None if a batch is running or no request can run."""
        if self.running or not self.queue:
            return None
        batch, tokens = self._next_batch()
        if not batch:
            return None
        self.running = batch
        for request in batch:
            request.began_s = now_s
            if request.adapter is not None:
                self._use(request.adapter, now_s)
        batch_s = self.speed.launch_s + tokens / self.speed.tokens_per_s
        self.busy_s += batch_s
        return batch_s

    def _next_batch(self) -> tuple[list[SimulatedRequest], int]:
        """Remove the oldest requests that can run from the queue. Returns them and their tokens."""
        batch: list[SimulatedRequest] = []
        skipped: list[SimulatedRequest] = []
        tokens = 0
        while self.queue and tokens < self.speed.batch_tokens:
            request = self.queue.popleft()
            if request.adapter is not None and request.adapter not in self.resident:
                skipped.append(request)
            elif batch and tokens + request.tokens > self.speed.batch_tokens:
                skipped.append(request)
                break
            else:
                batch.append(request)
                tokens += request.tokens
        self.queue.extendleft(reversed(skipped))
        return batch, tokens

    def _use(self, adapter: str, now_s: float) -> None:
        self.resident[adapter] = now_s
        self.resident.move_to_end(adapter)
        self.waiting[adapter] -= 1
        if not self.waiting[adapter]:
            del self.waiting[adapter]

    def finish_batch(self) -> list[SimulatedRequest]:
        batch, self.running = self.running, []
        tokens = sum(request.tokens for request in batch)
        self.queued_tokens -= tokens
        self.done_tokens += tokens
        return batch
