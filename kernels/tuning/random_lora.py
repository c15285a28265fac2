"""Projections with random weights and adapters, and functions that time calls, for tuner and benchmarks.

Letters as in `stack.py`; T rows (tokens) of the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from ranklet.kernels.packs import PACKS
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import LinearStack, SlotMeta, padded_rank

SCALING = 1.5
_LEAST_REPEATS = 6


class ProjectionShape(NamedTuple):
    """A packed linear projection: its input width and the output columns of its slices."""

    name: str
    wide: int
    widths: tuple[int, ...]


def projections(dims: Mapping[str, tuple[int, int]]) -> tuple[ProjectionShape, ...]:
    """Return a decoder layer's packed projections.

    Args:
        dims: (input width, output width) by module, as in `Architecture.module_dims`.
    """
    return tuple(
        ProjectionShape(name, dims[modules[0]][0], tuple(dims[module][1] for module in modules))
        for name, modules in PACKS.items()
    )


@dataclass(frozen=True, slots=True)
class RandomLora:
    """One projection with random weights, and a random adapter in every slot."""

    projection: ProjectionShape
    weight: Tensor  # [N, K]
    stack: LinearStack


def random_lora(
    projection: ProjectionShape, rank: int, slots: int, *, device: torch.device, dtype: torch.dtype
) -> RandomLora:
    """Draw weights with which base and LoRA outputs have a standard deviation of about 1. Zero beyond the rank."""
    wide, widths = projection.wide, projection.widths
    padded, slices = padded_rank(rank), len(widths)

    def draw(std: float, *size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(std)

    a = draw(wide**-0.5, slots, slices * padded, wide)
    b = draw(rank**-0.5, slots, sum(widths), padded)
    a.view(slots, slices, padded, wide)[:, :, rank:] = 0
    b[:, :, rank:] = 0
    ranks = torch.full((slots, slices), rank, dtype=torch.int32, device=device)
    stack = LinearStack(a, b, widths, ranks, torch.full((slots, slices), SCALING, device=device))
    stack.meta[:] = [SlotMeta((rank,) * slices, (SCALING,) * slices) for _ in range(slots)]
    return RandomLora(projection, draw(wide**-0.5, sum(widths), wide), stack)


def shrunk(
    x: Tensor,  # [T, K]
    stack: LinearStack,
    segment: Segment,
) -> Tensor:
    """Compute `s A x` of a segment's rows in float32. Returns [rows, slices * R]."""
    return SCALING * (x[segment.start : segment.stop].float() @ stack.a[segment.slot].float().t())


def expanded(
    h: Tensor,  # [rows, slices * R]
    stack: LinearStack,
    slot: int,
) -> Tensor:
    """Compute `B h` in float32. Returns [rows, N]."""
    pieces = h.float().split(stack.rank, dim=1)
    weights = stack.b[slot].float().split(stack.widths)
    return torch.cat([piece @ weight.t() for piece, weight in zip(pieces, weights, strict=True)], dim=1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call in a CUDA graph and return the function that replays it. On the CPU, return the call itself."""
    if not torch.cuda.is_available():
        return call
    call()  # compiles, and allocates memory that must outlive the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gpu_ms(call: Callable[[], object], *, rep_ms: int = 8) -> float:
    """Return the median time on the GPU, with the L2 cache cleared before each call. Without a GPU, see `wall_ms`."""
    if not torch.cuda.is_available():
        return wall_ms(call)
    found = float(do_bench(call, warmup=2, rep=rep_ms, return_mode="median"))
    if found * _LEAST_REPEATS > rep_ms:  # too few repeats for a median
        found = float(do_bench(call, warmup=1, rep=found * (_LEAST_REPEATS + 1), return_mode="median"))
    return found


def wall_ms(call: Callable[[], object], *, budget_ms: float = 20.0) -> float:
    """Return the mean time of calls back to back, as the median of three rounds that take `budget_ms` together.

    Where launching takes longer than computing, this is the CPU's time.
    """
    call()
    once = _round_ms(call, 1)
    if once > budget_ms:
        return once
    calls = max(1, min(20, int(budget_ms / 3 / once)))
    return median(_round_ms(call, calls) for _ in range(3))


def _round_ms(call: Callable[[], object], calls: int) -> float:
    _synchronize()
    began = perf_counter()
    for _ in range(calls):
        call()
    _synchronize()
    return (perf_counter() - began) * 1e3 / calls


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
