"""CUDA graphs of batches whose shape comes again: Python launches them once and the device replays them.

A small batch is over on the device long before Python has launched its hundreds of kernels. A full one is not, but with
full batches there is much else that Python must do meanwhile: requests to read, answers to send, adapters to load.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SIGHTINGS = 2  # of a shape before it is worth a graph
_REMEMBERED = 4096  # shapes whose sightings are counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _CapturedGraph:
    graph: Any
    inputs: Tensor
    outputs: Tensor


class GraphCache:
    """Graphs by shape, the least recently used dropped first. One thread, one stream.

    All share one pool of memory: what one returns holds until the next is replayed. A capture takes as long as some
    launches, for which other batches wait, and may enlarge the pool: `tests/bench/buckets.py` measures both.

    Args:
        device: of the batches.
        most: graphs that are kept.
    """

    def __init__(self, device: torch.device, most: int = 256) -> None:
        self._device = device
        self._most = most
        self._graphs: OrderedDict[Hashable, _CapturedGraph] = OrderedDict()
        self._sightings: OrderedDict[Hashable, float] = OrderedDict()  # of shapes without a graph
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, shape: Hashable, inputs: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """`forward(inputs on the device)`, replayed if a graph of this shape exists.

        Args:
            shape: equal only for calls that launch the same kernels with the same arguments, inputs' values aside.
            inputs: pinned, on the host.
            forward: reads nothing that changes between calls but its argument and device memory that stays in place.
        """
        found = self._graphs.get(shape)
        if found is None and self._is_due(shape):
            found = self._capture(shape, inputs, forward)
        if found is None:
            return forward(inputs.to(self._device, non_blocking=True))
        self._graphs.move_to_end(shape)
        found.inputs.copy_(inputs, non_blocking=True)
        found.graph.replay()
        return found.outputs

    def clear(self) -> None:
        """Drop all graphs, and the memory they hold."""
        if self._graphs:
            torch.cuda.current_stream(self._device).synchronize()
        self._graphs.clear()
        self._sightings.clear()

    def _is_due(self, shape: Hashable) -> bool:
        count = self._sightings.pop(shape, 0) + 1
        if count > _SIGHTINGS:
            return True
        self._sightings[shape] = count
        if len(self._sightings) > _REMEMBERED:
            self._sightings.popitem(last=False)
        return False

    def _capture(self, shape: Hashable, inputs: Tensor, forward: Callable[[Tensor], Tensor]) -> _CapturedGraph | None:
        main, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        static = inputs.to(self._device, non_blocking=True)
        if len(self._graphs) >= self._most:
            main.synchronize()  # the graph to drop may be running
            self._graphs.popitem(last=False)
        if not self._graphs:  # torch gives a pool up with its last graph, and then refuses to capture into it
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = forward(static)
                finally:
                    graph.capture_end()
        except Exception:  # some kernel cannot be captured: such batches are launched one kernel at a time
            logger.warning("no CUDA graph of a batch", exc_info=True)
            self._sightings[shape] = -math.inf
            return None
        main.wait_stream(self._stream)
        self._graphs[shape] = _CapturedGraph(graph, static, outputs)
        return self._graphs[shape]
