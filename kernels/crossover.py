"""What each backend took on batches of one GPU, as the tuner measured it, for `dispatch` to choose by."""

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
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Crossover:
    """One batch, its rows shared evenly among its adapters, through the LoRA projections of one decoder layer.

    `ms` is wall time by backend ("base": without LoRA), launched eagerly and back to back, so that the CPU's share
    shows where it is the larger.
    """

    rows: int
    adapters: int
    rank: int  # of every adapter; the pool's is this padded to 16
    hidden: int  # input width of the model's qkv
    scope: Scope  # attention: qkv and o; layer: gate_up and down too
    ms: Mapping[str, float]


_ALIKE = 0.7  # natural logarithm: widths within a factor of two belong to the same measurements


class Surface:
    """Milliseconds by backend of one kind of layer, between the measured batches by straight lines in logarithms."""

    def __init__(self, measured: Iterable[Crossover]) -> None:
        points: dict[int, dict[int, dict[int, Mapping[str, float]]]] = {}
        for one in measured:
            points.setdefault(padded_rank(one.rank), {}).setdefault(one.adapters, {})[one.rows] = one.ms
        self._by_rank = [(rank, [(n, sorted(rows.items())) for n, rows in sorted(found.items())])
                         for rank, found in sorted(points.items())]  # fmt: skip

    def ms(self, rows: int, adapters: int, rank: int) -> dict[str, float]:
        """What each backend should take; outside of what was measured, as at its edge.

        Args:
            rank: the pool's.
        """
        return _between(
            rank, self._by_rank, lambda ns: _between(adapters, ns, lambda found: _between(rows, found, dict))
        )


def _between(at: float, known: Sequence[tuple[int, K]], value: Callable[[K], dict[str, float]]) -> dict[str, float]:
    """Values at `at` from the known ones on both sides of it, sorted by their places."""
    above = bisect(known, at, key=lambda pair: pair[0])
    if above in (0, len(known)):
        return value(known[max(0, above - 1)][1])
    (left, low), (right, high) = known[above - 1 : above + 1]
    share = math.log(at / left) / math.log(right / left)
    here, there = value(low), value(high)
    return {name: here[name] ** (1 - share) * there[name] ** share for name in here}


def surface(measured: Iterable[Crossover], scope: Scope, hidden: int) -> Surface | None:
    """What was measured of layers like this one, None if nothing was.

    Args:
        hidden: input width of the layer's qkv; those within a factor of two count as alike, the nearest are taken.
    """
    alike = [one for one in measured if one.scope == scope and abs(math.log(one.hidden / hidden)) < _ALIKE]
    if not alike:
        return None
    nearest = min({one.hidden for one in alike}, key=lambda width: abs(math.log(width / hidden)))
    return Surface(one for one in alike if one.hidden == nearest)


@cache
def crossovers(device_index: int | None) -> tuple[Crossover, ...]:
    """All that was measured on a CUDA device; empty if nothing was, or for None (the CPU)."""
    if device_index is None:
        return ()
    path = path_for(torch.cuda.get_device_name(device_index))
    if not path.is_file():
        return ()
    return tuple(_parse(entry) for entry in json.loads(path.read_text()).get("crossovers", ()))


def _parse(entry: Mapping[str, Any]) -> Crossover:
    return Crossover(
        entry["rows"], entry["adapters"], entry["rank"], entry["hidden"], entry["scope"], dict(entry["ms"])
    )


def entry_of(crossover: Crossover) -> dict[str, Any]:
    """A crossover as a table holds it."""
    return {
        "rows": crossover.rows, "adapters": crossover.adapters, "rank": crossover.rank, "hidden": crossover.hidden,
        "scope": crossover.scope, "ms": {name: round(ms, 5) for name, ms in crossover.ms.items()},
    }  # fmt: skip
