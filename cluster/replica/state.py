"""The queue, the speed and the adapters of one replica, which it reports to gateways."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from ranklet.replicas.adapters.reference import HeldAdapters, LoadRecord
from ranklet.replicas.engine.stats import BatchRecord, CacheRoom, Listener
from ranklet.routing.prefix_log import PrefixLog
from ranklet.routing.report import Holdings, PrefixNews, QueueLoad, StateReport, wait_level
from ranklet.routing.speed import RunningMean, SpeedMeter

_LOADS_WINDOW = 8  # loads
_FULL_TEXTS = 0.5  # texts, as a share of the most, beyond which steps become longer rather than faster
_MAX_SENDERS = 1024  # gateways whose work is counted: those that called most recently


class ReplicaState(Listener):
    """Collects the state of a replica from its calls and its engine's records. Thread-safe.

    Work is in prefill-equivalent tokens, as in `ranklet.routing.report`.

    Args:
        replica: id of the replica.
        slots, pool_rank: of the engine.
        most_texts: that the engine runs at once.
        clock: monotonic, in seconds.
        wall_clock: Unix time; readers on other machines compare it with their own.
    """

    def __init__(
        self, replica: str, slots: int, pool_rank: int, clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time, most_texts: int = 512,
    ) -> None:  # fmt: skip
        self._most_texts = most_texts
        self._full_texts = max(1.0, _FULL_TEXTS * most_texts)
        self._first_token = RunningMean(math.inf)
        self._replica = replica
        self._clock = clock
        self._wall_clock = wall_clock
        self._queued_work = self._done_work = 0
        self._text_tokens = self._open_texts = 0  # of prompts of texts that have not begun; texts that have not ended
        self._texts = 0  # texts that have begun
        self._room: CacheRoom | None = None
        self._prefixes = PrefixLog()
        self._received_work: OrderedDict[str, int] = OrderedDict()
        self._speed = SpeedMeter()
        self._load_s = {tier: RunningMean(_LOADS_WINDOW) for tier in ("disk", "host")}
        self._busy_s = 0.0
        self._last_busy = (clock(), 0.0)
        self._loads_sent = 0
        self._level = 0
        self._holdings = Holdings(0, frozenset(), frozenset(), frozenset(), slots, 0, pool_rank)
        self._on_change: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def subscribe(self, on_change: Callable[[], None]) -> None:
        """Call `on_change`, on any thread, whenever the held adapters or the level of the wait change."""
        self._on_change = on_change

    def call_arrived(self, sender: str, work: int, texts: int = 0) -> None:
        """Count a call. `text_begun`, `text_finished` and `texts_dropped` count what becomes of its texts."""
        with self._lock:
            if texts:
                self._text_tokens += work
                self._open_texts += texts
            else:
                self._queued_work += work
            self._received_work[sender] = self._received_work.pop(sender, 0) + work
            if len(self._received_work) > _MAX_SENDERS:
                self._received_work.popitem(last=False)
        self._notice_level()

    def call_finished(self, work: int) -> None:
        with self._lock:
            self._queued_work -= work
            self._done_work += work
        self._notice_level()

    def text_begun(self, tokens: int, cached_tokens: int, pages: Iterable[int]) -> None:
        """Count the first token of a text.

        Args:
            tokens: of its prompt; 0 if another text of the call has counted the prompt.
            cached_tokens: of the prompt, which were in the prefix cache.
            pages: hashes of pages that routers are told of.
        """
        with self._lock:
            self._text_tokens -= tokens
            self._done_work += tokens
            self._texts += 1
            self._speed.add_prompt(tokens, cached_tokens)
            self._prefixes.add(pages)
        self._notice_level()

    def text_finished(self, output_tokens: int, kept_tokens: int, seconds: float, pages: Iterable[int]) -> None:
        """Count the end of a text that has begun; see `SpeedMeter.add_text`. Without output, it was cut short."""
        with self._lock:
            self._texts -= 1
            self._open_texts -= 1
            if output_tokens:
                self._speed.add_text(output_tokens, kept_tokens, seconds)
            self._prefixes.add(pages)

    def texts_dropped(self, texts: int, tokens: int) -> None:
        """Count texts that will not begin, and the tokens of their prompts."""
        with self._lock:
            self._open_texts -= texts
            self._text_tokens -= tokens
            self._done_work += tokens
        self._notice_level()

    def batch(self, record: BatchRecord) -> None:
        if record.compute_s > 0:
            # With a single text, steps follow each other without a pause, and yet there is room for hundreds.
            self._busy_s += record.compute_s * (1.0 if record.tokens else min(1.0, record.generated / self._full_texts))
        with self._lock:
            self._speed.add_step(record.tokens, record.generated, record.compute_s)
            self._room = record.room
        if record.tokens:
            self._notice_level()

    def load(self, record: LoadRecord) -> None:
        if record.error is None and record.tier in self._load_s:
            with self._lock:
                self._load_s[record.tier].add(record.seconds)

    def holdings_changed(self, held: HeldAdapters) -> None:
        resident, loading, hosted = frozenset(held.resident), frozenset(held.loading), frozenset(held.hosted)
        with self._lock:
            before = self._holdings
            after = replace(before, resident=resident, loading=loading, hosted=hosted, used_slots=held.used_slots)
            if after == before:  # only the order of use has changed
                return
            self._holdings = replace(after, number=before.number + 1)
        self._on_change()

    @property
    def holdings_number(self) -> int:
        return self._holdings.number

    @property
    def has_news(self) -> bool:
        """Whether there are pages that routers have not been told of."""
        return len(self._prefixes) > 0

    @property
    def loads_sent(self) -> int:
        return self._loads_sent

    def wait_s(self) -> float:
        """Return the time until waiting prompts are computed, and waiting texts run; 0 until a batch has been measured.

        Prompts are computed beside texts that run. These are a wait only for texts that may not run beside them.
        """
        with self._lock:
            return self._seconds(self._waiting_work()) + self._room_s()

    def level(self) -> int:
        """Return the level of the time that the waiting prompts and the running texts take."""
        with self._lock:
            return self._work_level()

    def busy(self) -> float:
        """Return the share of the time since the last call of this method in which the device computed.

        A step of texts alone counts by their number.
        """
        now_s, busy_s = self._clock(), self._busy_s
        (last_s, last_busy_s), self._last_busy = self._last_busy, (now_s, busy_s)
        return min((busy_s - last_busy_s) / (now_s - last_s), 1.0) if now_s > last_s else 0.0

    def first_token_came(self, first_token_s: float) -> None:
        with self._lock:
            self._first_token.add(first_token_s)

    def first_token_s(self) -> float | None:
        """Return the mean time to the first token since the last call of this method; None if no text has ended."""
        with self._lock:
            mean, self._first_token = self._first_token, RunningMean(math.inf)
        return mean.value if mean.weight else None

    def load_for(self, sender: str) -> QueueLoad:
        with self._lock:
            return self._next_load(self._received_work.get(sender, 0))

    def report(self, gateways: tuple[str, ...]) -> StateReport:
        with self._lock:
            disk_s, host_s = self._load_s["disk"].value, self._load_s["host"].value
            holdings = replace(self._holdings, from_disk_s=disk_s, from_host_s=host_s)
            news = None if self._room is None else PrefixNews(self._prefixes.take(), self._room.kept_s)
            return StateReport(self._replica, self._next_load(0), holdings, gateways, dict(self._received_work), news)

    def _waiting_work(self) -> float:
        return self._queued_work + self._text_tokens * self._speed.uncached_share

    def _seconds(self, work: float) -> float:
        return work / self._speed.work_per_s if self._speed.work_per_s else 0.0

    def _work_level(self) -> int:
        work = self._waiting_work() + self._texts * self._speed.text_work
        return wait_level(self._seconds(work) + self._room_s())

    def _room_s(self) -> float:
        """Return the time until the waiting texts may run beside the others, and have room in the key-value cache."""
        ended_per_s = self._speed.ended_per_s(self._most_texts)
        freed_per_s = self._speed.freed_per_s(self._texts)
        places_s = max(self._open_texts - self._most_texts, 0) / ended_per_s if ended_per_s else 0.0
        return max(places_s, -self._free_tokens() / freed_per_s if freed_per_s else 0.0)

    def _free_tokens(self) -> float:
        """Return the tokens that fit into the key-value cache, less those of waiting prompts."""
        waiting = self._text_tokens * self._speed.uncached_share
        return math.inf if self._room is None else self._room.free_tokens - waiting

    def _notice_level(self) -> None:
        with self._lock:
            before, self._level = self._level, self._work_level()
            changed = self._level != before
        if changed:
            self._on_change()

    def _next_load(self, received_work: int) -> QueueLoad:
        self._loads_sent += 1
        speed = self._speed
        return QueueLoad(
            self._loads_sent, self._waiting_work(), speed.work_per_s, self._done_work, received_work,
            self._wall_clock(), self._texts, speed.text_work, self._free_tokens(), speed.freed_per_s(self._texts),
            self._most_texts - self._open_texts, speed.ended_per_s(self._most_texts),
        )  # fmt: skip
