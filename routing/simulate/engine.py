"""A replica as the simulation sees it: slots, loads, and one batch at a time, oldest prompts first."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

LATELY_S = 30.0  # as `ranklet.replicas.adapters.manager` has it


@dataclass(frozen=True, slots=True)
class Speed:
    """What a replica can do, as measured on one H200: tests/bench/results/engine-h200.json and cluster-4xh200.json.

    Loads take less by now (loads-h200.json): 0.11 s with the hash of the files, 0.005 s.
    """

    tokens_per_s: float = 328_000.0  # of large batches with LoRA
    launch_s: float = 0.0025  # of any batch
    batch_tokens: int = 30_720
    disk_s: float = 0.15  # an adapter from disk into a slot
    host_s: float = 0.02  # from the host cache
    readers: int = 8


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One prompt of one adapter (None: base)."""

    id: int
    adapter: str | None
    tokens: int
    gateway: int
    arrived_s: float
    began_s: float = 0.0
    hit: bool = True


@dataclass(slots=True)
class SimulatedEngine:
    """One replica. Its caller keeps the time and the calendar."""

    slots: int
    hosted_most: int
    speed: Speed
    resident: "OrderedDict[str, float]" = field(default_factory=OrderedDict)  # when last used, the longest ago first
    hosted: "OrderedDict[str, None]" = field(default_factory=OrderedDict)
    loading: set[str] = field(default_factory=set)
    running: list[SimulatedRequest] = field(default_factory=list)
    queue: "deque[SimulatedRequest]" = field(default_factory=deque)
    queued_tokens: int = 0  # waiting and running
    received: "Counter[int]" = field(default_factory=Counter)  # tokens, by gateway
    done_tokens: int = 0
    busy_s: float = 0.0
    loads: int = 0
    changes: int = 0  # of what is resident
    wanted: "Counter[str]" = field(default_factory=Counter)  # adapters of the queue

    def take(self, request: SimulatedRequest) -> None:
        """A request arrives."""
        self.queue.append(request)
        self.queued_tokens += request.tokens
        self.received[request.gateway] += request.tokens
        if request.adapter is not None:
            self.wanted[request.adapter] += 1
            request.hit = request.adapter in self.resident

    def bring(self) -> list[tuple[str, float]]:
        """Loads to start now, and how long each takes: what the queue needs, oldest first."""
        started: list[tuple[str, float]] = []
        for name in self.wanted:
            if len(self.loading) >= self.speed.readers:
                break
            if name not in self.resident and name not in self.loading:
                if not self._make_room(lambda other: other not in self.wanted):
                    break
                started.append(self._start(name))
        return started

    def offer(self, name: str, now_s: float) -> list[tuple[str, float]]:
        """As `ranklet.replicas.adapters.manager` has it: an adapter that may be wanted, if there is a slot to spare."""
        if name in self.resident or name in self.loading or len(self.loading) >= self.speed.readers:
            return []
        spare = self._make_room(lambda other: other not in self.wanted and now_s - self.resident[other] >= LATELY_S)
        return [self._start(name)] if spare else []

    def _start(self, name: str) -> tuple[str, float]:
        self.loading.add(name)
        self.loads += 1
        return name, self.speed.host_s if name in self.hosted else self.speed.disk_s

    def _make_room(self, may_go: Callable[[str], bool]) -> bool:
        if len(self.resident) + len(self.loading) < self.slots:
            return True
        used = {request.adapter for request in self.running}
        victim = next((name for name in self.resident if name not in used and may_go(name)), None)
        if victim is None:
            return False
        del self.resident[victim]
        self.changes += 1
        return True

    def used_slots(self, now_s: float) -> int:
        """As `Holdings.used_slots`."""
        return len(self.loading) + sum(now_s - since_s < LATELY_S for since_s in self.resident.values())

    def loaded(self, name: str, now_s: float) -> None:
        """A load has ended."""
        self.loading.discard(name)
        self.resident[name] = now_s
        self.changes += 1
        self.hosted[name] = None
        self.hosted.move_to_end(name)
        if len(self.hosted) > self.hosted_most:
            self.hosted.popitem(last=False)

    def launch(self, now_s: float) -> float | None:
        """Start the next batch; how long it takes, None if nothing is ready or one runs."""
        if self.running or not self.queue:
            return None
        batch, passed, tokens = self.running, [], 0
        while self.queue and tokens < self.speed.batch_tokens:
            request = self.queue.popleft()
            if request.adapter is not None and request.adapter not in self.resident:
                passed.append(request)
            elif batch and tokens + request.tokens > self.speed.batch_tokens:
                passed.append(request)
                break
            else:
                batch.append(request)
                tokens += request.tokens
        self.queue.extendleft(reversed(passed))
        if not batch:
            return None
        for request in batch:
            request.began_s = now_s
            name = request.adapter
            if name is not None:
                self.resident[name] = now_s
                self.resident.move_to_end(name)
                self.wanted[name] -= 1
                if not self.wanted[name]:
                    del self.wanted[name]
        took_s = self.speed.launch_s + tokens / self.speed.tokens_per_s
        self.busy_s += took_s
        return took_s

    def finish(self) -> list[SimulatedRequest]:
        """The batch has ended; its requests."""
        batch, self.running = self.running, []
        tokens = sum(request.tokens for request in batch)
        self.queued_tokens -= tokens
        self.done_tokens += tokens
        return batch
