"""Times of each LoRA backend on one GPU, measured by the tuner. `dispatch` chooses backends by them."""

import json
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch

from ranklet.kernels.stack import padded_rank
from ranklet.kernels.tiles import path_for

Scope = Literal["attention", "layer"]
Known = TypeVar("Known")
_ALIKE = 0.7  # natural logarithm: about a factor of two


@dataclass(frozen=True, slots=True)
class Crossover:
    """Times of one batch through the LoRA projections of one decoder layer. Adapters share its rows evenly.

    Attributes:
        rank: of every adapter. The pool's rank is a multiple of 16.
        hidden: input width of the model's qkv.
        scope: "attention" is qkv and o; "layer" adds gate_up and down.
        ms: wall time by backend; "base" is without LoRA. Calls run back to back without CUDA graphs. Where launching
            takes longer than computing, this is the CPU's time.
    """

    rows: int
    adapters: int
    rank: int
    hidden: int
    scope: Scope
    ms: Mapping[str, float]


class Surface:
    """Times by backend for one kind of layer, interpolated linearly in logarithms between measured batches."""

    def __init__(self, measured: Iterable[Crossover]) -> None:
        points: dict[int, dict[int, dict[int, Mapping[str, float]]]] = {}
        for one in measured:
            points.setdefault(padded_rank(one.rank), {}).setdefault(one.adapters, {})[one.rows] = one.ms
        self._by_rank = [
            (rank, [(adapters, sorted(by_rows.items())) for adapters, by_rows in sorted(by_adapters.items())])
            for rank, by_adapters in sorted(points.items())
        ]

    def ms(self, rows: int, adapters: int, rank: int) -> dict[str, float]:
        """Return the expected time of each backend. Beyond the measured range, the nearest edge applies.

        Args:
            rank: of the pool.
        """
        return _between(
            rank,
            self._by_rank,
            lambda by_adapters: _between(adapters, by_adapters, lambda by_rows: _between(rows, by_rows, dict)),
        )


def _between(
    at: float, known: Sequence[tuple[int, Known]], value: Callable[[Known], dict[str, float]]
) -> dict[str, float]:
    above = bisect(known, at, key=lambda pair: pair[0])
    if above in (0, len(known)):
        return value(known[max(0, above - 1)][1])
    (left, low), (right, high) = known[above - 1 : above + 1]
    share = math.log(at / left) / math.log(right / left)
    here, there = value(low), value(high)
    return {name: here[name] ** (1 - share) * there[name] ** share for name in here}


def scope_of(projections: Sequence[object]) -> Scope:
    return "attention" if len(projections) <= 2 else "layer"


def surface(measured: Iterable[Crossover], scope: Scope, hidden: int) -> Surface | None:
    """Return the measurements of the nearest `hidden` within a factor of two, None if there are none.

    Args:
        hidden: input width of the layer's qkv.
    """
    alike = [one for one in measured if one.scope == scope and abs(math.log(one.hidden / hidden)) < _ALIKE]
    if not alike:
        return None
    nearest = min({one.hidden for one in alike}, key=lambda width: abs(math.log(width / hidden)))
    return Surface(one for one in alike if one.hidden == nearest)


@cache
def crossovers(device_index: int | None) -> tuple[Crossover, ...]:
    """Return the measurements of a CUDA device. Empty if it was not measured, and for None (the CPU)."""
    if device_index is None:
        return ()
    path = path_for(torch.cuda.get_device_name(device_index))
    if not path.is_file():
        return ()
    return tuple(from_entry(entry) for entry in json.loads(path.read_text()).get("crossovers", ()))


def from_entry(entry: Mapping[str, Any]) -> Crossover:
    return Crossover(
        entry["rows"], entry["adapters"], entry["rank"], entry["hidden"], entry["scope"], dict(entry["ms"])
    )


def to_entry(crossover: Crossover) -> dict[str, Any]:
    return {
        "rows": crossover.rows, "adapters": crossover.adapters, "rank": crossover.rank, "hidden": crossover.hidden,
        "scope": crossover.scope, "ms": {name: round(ms, 5) for name, ms in crossover.ms.items()},
    }  # fmt: skip
