"""What a replica can say of itself: its queue, its speed, what it holds. Told by its calls and its engine's records."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from ranklet.replicas.engine.stats import BatchRecord, HeldAdapters, Listener, LoadRecord
from ranklet.routing.report import Holdings, QueueLoad, StateReport, level

_WINDOW_TOKENS = 500_000  # over which speed is averaged
_WINDOW_LOADS = 8
_SENDERS = 1024  # gateways whose tokens are counted, the latest ones


@dataclass
class _Mean:
    """A running mean by weight, over about `window` of it."""

    window: float
    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.weight = min(self.weight, self.window) + weight
        self.value += (value - self.value) * weight / self.weight


@dataclass
class ReplicaState(Listener):
    """One replica's standing. Thread-safe.

    Args:
        replica: its id.
        slots, pool_rank: of its engine.
    """

    replica: str
    slots: int
    pool_rank: int
    _queued_tokens: int = 0
    _done_tokens: int = 0
    _busy_s: float = 0.0
    _asked: tuple[float, float] = (0.0, 0.0)  # when `busy` was last asked for, and the time busy until then
    _number: int = 0
    _held_number: int = 0
    _said: HeldAdapters = field(default_factory=HeldAdapters)
    _held: tuple[frozenset[str], frozenset[str], frozenset[str], int] = (frozenset(), frozenset(), frozenset(), 0)
    _received: "OrderedDict[str, int]" = field(default_factory=OrderedDict)
    _speed: _Mean = field(default_factory=lambda: _Mean(_WINDOW_TOKENS))
    _load_s: dict[str, _Mean] = field(default_factory=lambda: {tier: _Mean(_WINDOW_LOADS) for tier in ("disk", "host")})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arrived(self, sender: str, tokens: int) -> None:
        """A call is in."""
        with self._lock:
            self._queued_tokens += tokens
            self._received[sender] = self._received.pop(sender, 0) + tokens
            if len(self._received) > _SENDERS:
                self._received.popitem(last=False)

    def settled(self, tokens: int) -> None:
        """It was answered, refused or dropped."""
        with self._lock:
            self._queued_tokens -= tokens
            self._done_tokens += tokens

    def batch(self, record: BatchRecord) -> None:
        if record.compute_s > 0:
            self._busy_s += record.compute_s
            with self._lock:  # by tokens: what large batches do is what a queue is emptied with
                self._speed.add(record.tokens / record.compute_s, record.tokens)

    def load(self, record: LoadRecord) -> None:
        if record.error is None and record.tier in self._load_s:
            with self._lock:
                self._load_s[record.tier].add(record.seconds)

    def holds(self, said: HeldAdapters) -> None:
        """What the engine holds now; in which order says nothing."""
        if said == self._said:
            return
        self._said = said
        now = frozenset(said.resident), frozenset(said.coming), frozenset(said.hosted), said.taken
        with self._lock:
            if now != self._held:
                self._held = now
                self._held_number += 1

    @property
    def held_number(self) -> int:
        """Grows with each change of what is held."""
        return self._held_number

    @property
    def loads_told(self) -> int:
        """Grows with each load that went back with an answer, or was reported."""
        return self._number

    def wait_s(self) -> float:
        """The expected wait of what would come now; 0 while no batch has been measured."""
        with self._lock:
            return self._queued_tokens / self._speed.value if self._speed.value else 0.0

    def busy(self) -> float:
        """Share of the time since it was last asked for that the device computed."""
        now_s, busy_s = time.monotonic(), self._busy_s
        (since_s, before_s), self._asked = self._asked, (now_s, busy_s)
        return min((busy_s - before_s) / (now_s - since_s), 1.0) if since_s and now_s > since_s else 0.0

    def level(self) -> int:
        """The expected wait, coarsely: changes of it are worth telling."""
        return level(self.wait_s())

    def now(self, sender: str) -> QueueLoad:
        """What goes back with an answer to this sender."""
        with self._lock:
            return self._load(self._received.get(sender, 0))

    def report(self, gateways: tuple[str, ...]) -> StateReport:
        """What all `gateways` are told."""
        with self._lock:
            disk, host = self._load_s["disk"].value, self._load_s["host"].value
            resident, coming, hosted, taken = self._held
            held = Holdings(self._held_number, resident, coming, hosted, self.slots, taken, self.pool_rank, disk, host)
            return StateReport(self.replica, self._load(0), held, gateways, dict(self._received))

    def _load(self, received_tokens: int) -> QueueLoad:
        self._number += 1
        speed, now_s = self._speed.value, time.time()
        return QueueLoad(self._number, self._queued_tokens, speed, self._done_tokens, received_tokens, now_s)
