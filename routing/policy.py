"""The settings of the routing policy, and the choice that it makes. NOTES.md defines home, crowded and extra home.

Ties: see `Policy.tie_window_s`. How long a silent replica is tolerated: see `REPLICA_SILENCE_LIMIT_S`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

SHORTLIST = 8  # replicas in a choice: a router may find the best one full or dead
REPLICA_SILENCE_LIMIT_S = 4.0  # a replica that owes answers and sends nothing for longer counts as hung

_ABOVE_ZERO = ("max_load_per_home", "max_load_per_home_if_tight")
# Former names of `Policy`'s fields. They are refused with the new name in the message.
RENAMED = {
    "load_of_home": "max_load_per_home",
    "load_of_crowded_home": "max_load_per_home_if_tight",
    "tie_s": "tie_window_s",
    "scatter_s": "extra_home_cost_s",
    "reluctance": "away_wait_surcharge",
    "tight_loads": "extra_home_loads_if_tight",
    "displace_s": "eviction_cost_s",
    "relief_s": "prefetch_wait_s",
    "prefetch_s": "prefetch_interval_s",
    "share_s": "other_router_cost_s",
    "damping": "report_age_factor",
    "padding_s": "rank_padding_cost_s",
}


@dataclass(frozen=True)
class Policy:
    """Settings of the costs that a router adds to a replica's expected wait.

    Attributes:
        max_load_per_home: Share of a replica's rate that one adapter may use before it gets another home.
        max_load_per_home_if_tight: Upper bound to which max_load_per_home is raised where slots are too few.
        tie_window_s: Waits that differ by less count as equal: a random cost up to this breaks ties.
        extra_home_cost_s: Cost of using an adapter beyond its homes, in addition to its load.
        away_wait_surcharge: Fraction added to the wait at replicas that are no home and do not hold the adapter.
        extra_home_loads_if_tight: Number of later loads that an extra home causes where the adapters need nearly all
            slots; their time is added to its cost.
        eviction_cost_s: Cost of a load where every slot holds an adapter that no other replica has.
        prefetch_wait_s: Wait that a prefetch to a free slot elsewhere must save before it is ordered.
        prefetch_interval_s: Shortest time between two such prefetches of one adapter.
        other_router_cost_s: Cost of a home that another gateway's router prefers, so that each router mostly uses its
            own part of the replicas.
        report_age_factor: A random cost of up to this many times the age of reports is added to replicas that this
            router does not prefer, so that routers with old reports do not all switch at once.
        rank_padding_cost_s: Cost per unit of work and per rank between the adapter's rank and the pool's, as measured
            by `ranklet profile` on an H200.
        uncached_factor: Factor of the time to compute those tokens of a text's prompt that a replica has not cached.
            More than 1, because they also delay other requests.
        running_text_share: Part of the time that running texts still take that counts as wait.

    Raises:
        ValueError: a field is out of range.
    """

    max_load_per_home: float = 0.02
    max_load_per_home_if_tight: float = 0.5
    tie_window_s: float = 0.005
    extra_home_cost_s: float = 0.1
    away_wait_surcharge: float = 1.0
    extra_home_loads_if_tight: float = 4
    eviction_cost_s: float = 0.3
    prefetch_wait_s: float = 0.05
    prefetch_interval_s: float = 0.5
    other_router_cost_s: float = 0.02
    report_age_factor: float = 2.0
    rank_padding_cost_s: float = 2.4e-9
    uncached_factor: float = 3.0
    running_text_share: float = 0.2

    def __post_init__(self) -> None:
        if findings := check_policy(vars(self)):
            raise ValueError("; ".join(findings))


def check_policy(kwargs: Mapping[str, Any]) -> list[str]:
    """Return one finding for each invalid setting of `request_router_kwargs`; none if `Policy(**kwargs)` is valid."""
    return [finding for name, value in kwargs.items() if (finding := _check_name(name) or _check_value(name, value))]


def _check_name(name: str) -> str | None:
    known = [each.name for each in fields(Policy)]
    if name in known:
        return None
    if name in RENAMED:
        return f"{name}: renamed to {RENAMED[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name}: unknown" + (f" (did you mean {near[0]}?)" if near else "") + f". Known: {', '.join(known)}"


def _check_value(name: str, value: Any) -> str | None:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        return f"{name}: expected a number from 0 on, got {value!r}"
    if name in _ABOVE_ZERO and not value:
        return f"{name}: expected more than 0, got 0"
    return None


class Choice(NamedTuple):
    """The replicas for a request.

    Attributes:
        order: indices of replicas, the best first, up to SHORTLIST.
        hit: whether the best replica has reported that it holds the adapter; None without an adapter.
        spill: why the best replica is not one of the adapter's homes: "load" (the homes are too busy) or "retry" (a
            home has just failed the request). None if it is a home.
        prefetch: ids of replicas that should load the adapter now, ahead of requests.
    """

    order: tuple[int, ...]
    hit: bool | None = None
    spill: str | None = None
    prefetch: tuple[str, ...] = ()
