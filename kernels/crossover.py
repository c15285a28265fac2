"""What each backend took on batches of one GPU, as the tuner measured it, for `dispatch` to choose by."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from ranklet.kernels.tiles import path_for

Scope = Literal["attention", "layer"]


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
