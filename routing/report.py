"""A replica's reports to routers: its queue with every answer, and its adapters at every change.

Work is counted in prefill-equivalent tokens. For prompts, one token is one unit of work. See `speed.py` for texts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

RANK = "rank"  # key of a replica's metadata at Serve
REPORT_INTERVAL_S = 1.0  # longest time between two reports of a replica, with few gateways
NEWS_INTERVAL_S = 0.2  # time from a report to the next one, if there is news of prefixes
_SHORTEST_INTERVAL_S = 0.05
_SHORTEST_INTERVAL_PER_GATEWAY_S = 0.005
_FIRST_LEVEL_S = 0.05
_MAX_WORK = 1 << 50
_MIN_WORK_PER_S = 1e-3
_MAX_LOAD_S = 3600.0
_MAX_AGE_S = 10.0


def min_report_interval_s(gateways: int) -> float:
    """Return the shortest time between two reports of a replica, each of which goes to every gateway."""
    return max(_SHORTEST_INTERVAL_S, _SHORTEST_INTERVAL_PER_GATEWAY_S * gateways)


def wait_level(wait_s: float) -> int:
    """Return the level of a wait: 0 up to 50 ms, then one more for each doubling. Each change of it is reported."""
    return math.ceil(math.log2(wait_s / _FIRST_LEVEL_S)) if wait_s > _FIRST_LEVEL_S else 0


def limited_age_s(age_s: float) -> float:
    """Return the age of a report by wall clocks, limited to 0 to 10 s."""
    return min(max(age_s, 0.0), _MAX_AGE_S) if math.isfinite(age_s) else 0.0


@dataclass(frozen=True)
class QueueLoad:
    """A replica's queue at one moment. Work is in prefill-equivalent tokens.

    Attributes:
        number: increases with each load that the replica sends. A router ignores loads that arrive out of order.
        queued_work: waiting and running, without the texts that have begun.
        work_per_s: while the replica computes; 0 if not measured yet.
        done_work: since the replica started.
        received_work: work from the receiving router that had reached the queue. The router itself adds the rest.
        at_s: wall clock of the replica's machine.
        texts: number of texts that have begun.
        text_work: of the tokens of one text; 0 if no text has ended yet.
        free_tokens: of the key-value cache, free or cached, less what waiting texts take; negative if they wait for it.
        freed_per_s: tokens of the key-value cache that ended texts give back.
        free_texts: further texts that could run, less those that wait; negative if more wait.
        ended_per_s: texts that end while as many run as can; 0 if not measured yet.
    """

    number: int
    queued_work: float
    work_per_s: float
    done_work: float
    received_work: float
    at_s: float = 0.0
    texts: int = 0
    text_work: float = 0.0
    free_tokens: float = math.inf
    freed_per_s: float = 0.0
    free_texts: float = math.inf
    ended_per_s: float = 0.0

    def is_possible(self) -> bool:
        amounts = (
            self.queued_work, self.done_work, self.received_work, self.texts, self.text_work, self.freed_per_s,
            self.ended_per_s,
        )  # fmt: skip
        rate = self.work_per_s
        is_rate = rate == 0 or _MIN_WORK_PER_S <= rate <= _MAX_WORK
        are_rooms = all(n >= -_MAX_WORK for n in (self.free_tokens, self.free_texts))
        return is_rate and are_rooms and all(0 <= n <= _MAX_WORK for n in amounts)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The adapters of a replica by place, and how long a load takes there.

    Attributes:
        number: increases with each change.
        resident: adapters ready in a slot of the device.
        loading: adapters on their way to a slot.
        hosted: adapters in host memory.
        slots: slots of the device.
        used_slots: slots whose adapter is loading or was used recently. The other slots can be reused at no cost.
        pool_rank: rank that every adapter is padded to.
        from_disk_s, from_host_s: time of a load from disk or host memory; 0 if not measured yet.
    """

    number: int
    resident: frozenset[str]
    loading: frozenset[str]
    hosted: frozenset[str]
    slots: int
    used_slots: int
    pool_rank: int
    from_disk_s: float = 0.0
    from_host_s: float = 0.0

    def is_possible(self) -> bool:
        times_s = (self.from_disk_s, self.from_host_s)
        return all(0 <= s <= _MAX_LOAD_S for s in times_s) and min(self.slots, self.used_slots, self.pool_rank) >= 0


@dataclass(frozen=True, slots=True)
class PrefixNews:
    """Prefixes that a replica has in its key-value cache.

    Attributes:
        pages: hashes of pages (see `prefix.py`) that were used since the last report. The pages before them are cached
            too.
        kept_s: pages that were used within this time are cached; infinite if none was evicted.
    """

    pages: tuple[int, ...] = ()
    kept_s: float = math.inf

    def is_possible(self) -> bool:
        return self.kept_s >= 0


@dataclass(frozen=True, slots=True)
class StateReport:
    """A replica's queue, adapters and prefixes, sent to every gateway.

    Attributes:
        load: without `received_work`. Each gateway reads its own from `received_work` below.
        gateways: ids of the gateways that the report is sent to, in an order that all replicas agree on.
        received_work: by gateway id.
        prefixes: None if the replica makes no text.
    """

    replica: str
    load: QueueLoad
    holdings: Holdings
    gateways: tuple[str, ...]
    received_work: Mapping[str, float] = field(default_factory=dict)
    prefixes: PrefixNews | None = None
