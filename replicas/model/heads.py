"""Heads compute outputs from hidden states.

Letters: T tokens of the batch, B sequences, R selected rows, H hidden width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.pooling import Pooling


class Head(Protocol):
    """Computes one output for each sequence. Hashable, because the key of a CUDA graph contains the step's heads."""

    @property
    def reads_last(self) -> bool:
        """Whether the head reads only each sequence's last token. The last layer may then compute no other token."""

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        """Select the states that the head reads: [T, H] -> [R, H]. Not called if only last tokens were computed."""

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        """Compute outputs [B, ...] on the device from the selected rows [R, H], to which the final norm was applied."""

    def are_valid(self, outputs: NDArray[Any]) -> NDArray[np.bool_]:
        """Check outputs [B, ...] on the host. Returns [B]; an invalid output fails only its own request."""


@dataclass(frozen=True, eq=False)  # compared by identity, because each step compares the heads of its spans
class PoolingHead:
    """Pools the states of each sequence into a vector: float32 [B, H]."""

    pooling: Pooling

    @property
    def reads_last(self) -> bool:
        return self.pooling.mode == "last"

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        return self.pooling.rows(states, spans)

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        return self.pooling.vectors(rows, spans)

    def are_valid(self, outputs: NDArray[Any]) -> NDArray[np.bool_]:
        finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(outputs), axis=1)
        return finite
