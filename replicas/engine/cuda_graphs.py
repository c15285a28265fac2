"""CUDA graphs of steps: Python launches a step's kernels once, and the device replays them for equal steps.

Launching the hundreds of kernels of a small step takes Python longer than running them takes the device. For a full
step it does not, but a replay leaves Python time to read requests, send answers and load adapters.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_CAPTURE_AFTER = 1  # eager runs of a key before it is captured: the first one loads its kernels
RUNS_TO_CAPTURE = _CAPTURE_AFTER + 1  # of a key, until its graph exists
NEVER = math.inf
_COUNTED_KEYS = 4096

logger = logging.getLogger(__name__)
Outputs = TypeVar("Outputs")


@dataclass(frozen=True, slots=True)
class _CapturedGraph:
    graph: Any
    inputs: Tensor
    outputs: Any


class GraphCache:
    """Graphs by key; the least recently used is dropped first. For one thread and one stream.

    All graphs share one memory pool: a graph's outputs are valid until the next replay of any graph. A capture takes as
    long as some eager launches and may enlarge the pool; `tests/bench/buckets.py` measures both.

    Args:
        max_graphs: number of graphs, unless more are kept.
    """

    def __init__(self, device: torch.device, max_graphs: int = 512) -> None:
        self._device = device
        self.max_graphs = max_graphs
        self._capture_after: float = _CAPTURE_AFTER
        self._graphs: OrderedDict[Hashable, _CapturedGraph] = OrderedDict()
        self._kept: dict[Hashable, _CapturedGraph] = {}
        self._eager_runs: OrderedDict[Hashable, float] = OrderedDict()  # of keys without a graph
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs) + len(self._kept)

    @contextmanager
    def capturing_after(self, eager_runs: float) -> Iterator[None]:
        """Capture a key after this number of eager runs, while the context is open. For 0, kernels must be loaded."""
        before, self._capture_after = self._capture_after, eager_runs
        try:
            yield
        finally:
            self._capture_after = before

    def keep_all(self) -> None:
        """Keep the graphs that exist until `clear`."""
        self._kept |= self._graphs
        self._graphs.clear()

    def run(self, key: Hashable, inputs: Tensor, forward: Callable[[Tensor], Outputs]) -> Outputs:
        """Return `forward(inputs on the device)`, replayed if a graph of this key exists.

        Args:
            key: equal only for calls that launch the same kernels with the same arguments, apart from input values.
            inputs: pinned host memory.
            forward: reads only its argument and device memory that stays in place.
        """
        found = self._kept.get(key) or self._graphs.get(key)
        if found is None and self._is_due(key):
            found = self._capture(key, inputs, forward)
        if found is None:
            return forward(inputs.to(self._device, non_blocking=True))
        if key in self._graphs:
            self._graphs.move_to_end(key)
        found.inputs.copy_(inputs, non_blocking=True)
        found.graph.replay()
        outputs: Outputs = found.outputs
        return outputs

    def clear(self) -> None:
        if len(self):
            torch.cuda.current_stream(self._device).synchronize()  # a graph may be running
        self._graphs.clear()
        self._kept.clear()
        self._eager_runs.clear()

    def _is_due(self, key: Hashable) -> bool:
        count = self._eager_runs.pop(key, 0) + 1
        if count > self._capture_after:
            return True
        self._eager_runs[key] = count
        if len(self._eager_runs) > _COUNTED_KEYS:
            self._eager_runs.popitem(last=False)
        return False

    def _capture(self, key: Hashable, inputs: Tensor, forward: Callable[[Tensor], Any]) -> _CapturedGraph | None:
        main, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        static = inputs.to(self._device, non_blocking=True)
        if self._graphs and len(self) >= self.max_graphs:
            main.synchronize()  # the graph to drop may be running
            self._graphs.popitem(last=False)
        if not len(self):  # torch frees a pool with its last graph, and then refuses to capture into it
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = forward(static)
                finally:
                    graph.capture_end()
        except Exception:  # a kernel cannot be captured: steps of this key are launched from Python
            logger.warning("a step could not be captured as a CUDA graph", exc_info=True)
            self._eager_runs[key] = -math.inf  # not due again while it is counted
            return None
        main.wait_stream(self._stream)
        self._graphs[key] = _CapturedGraph(graph, static, outputs)
        return self._graphs[key]
