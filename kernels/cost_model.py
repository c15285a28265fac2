"""Estimates the time of each LoRA backend on a layer, for GPUs that were not measured.

This is a roofline model: a step takes the longer of its memory time and its matrix units' time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ranklet.kernels.crossover import Surface

# Rates of a Hopper GPU. Choices depend only on their ratios, which are similar on all data-centre GPUs.
_BYTES_PER_S = 4e12
_FLOPS = 6.5e14
_LAUNCH_S = 6e-6
_ELEMENT_BYTES = 2
_FUSED_LOSS = 0.1  # how much slower than cuBLAS the fused product is


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The properties of a decoder layer that the choice of a backend depends on.

    Attributes:
        projections: input width and output widths of the slices, for each projection with LoRA.
        rank: of the adapter pool.
        measured: times on this GPU; None if there are no measurements that fit.
    """

    projections: tuple[tuple[int, tuple[int, ...]], ...]
    rank: int
    cuda: bool
    measured: Surface | None = None


def estimate_s(rows: Sequence[int], layer: LoraLayer) -> dict[str, float]:
    """Estimate the seconds that each backend needs for one layer, given the rows of each adapter."""
    costs = dict.fromkeys(("native", "csgmv", "merged"), 0.0)
    for wide, widths in layer.projections:
        out, slices, total = sum(widths), len(widths), sum(rows)
        base = _time_s(total * (wide + out) + wide * out, 2.0 * total * wide * out)
        shrink = [_time_s(n * (wide + slices * layer.rank), 2.0 * n * wide * slices * layer.rank) for n in rows]
        expand = [_time_s(2 * n * out + out * layer.rank, 2.0 * n * out * layer.rank) for n in rows]
        weights = len(rows) * layer.rank * (slices * wide + out)
        costs["native"] += base + sum(
            max(a, _LAUNCH_S) + max(b, slices * _LAUNCH_S) for a, b in zip(shrink, expand, strict=True)
        )
        added = min(sum(expand), _FUSED_LOSS * base + _time_s(0, 2.0 * total * out * layer.rank))
        costs["csgmv"] += base + sum(shrink) + added + _time_s(weights, 0.0) + 2 * _LAUNCH_S
        merge = max(_time_s(3 * wide * out, 2.0 * wide * out * layer.rank), (1 + slices) * _LAUNCH_S)
        costs["merged"] += sum(
            merge + max(_time_s(n * (wide + out) + wide * out, 2.0 * n * wide * out), _LAUNCH_S) for n in rows
        )
    return costs


def _time_s(elements: float, operations: float) -> float:
    return max(elements * _ELEMENT_BYTES / _BYTES_PER_S, operations / _FLOPS)
