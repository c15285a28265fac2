"""Heads: what a pass makes of hidden states. Letters: T tokens of the batch, B sequences, H hidden width."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ranklet.replicas.model.attention import Spans
from ranklet.replicas.model.pooling import Pooling


class Head(Protocol):
    """Turns hidden states into one output a sequence. Hashable: a CUDA graph is captured for each combination."""

    @property
    def reads_last(self) -> bool:
        """Whether it reads only the state of each sequence's last token. The last layer then computes no others."""

    def rows(self, states: Tensor, spans: Spans) -> Tensor:
        """Select the states that the head reads: [T, H] -> [R, H]. Not called where only last tokens are computed."""

    def finish(self, rows: Tensor, spans: Spans) -> Tensor:
        """Compute outputs [B, ...] on the device from selected rows [R, H], after the model's final norm."""

    def are_valid(self, outputs: NDArray[Any]) -> NDArray[np.bool_]:
        """Check outputs [B, ...] on the host; a sequence whose output is invalid fails alone."""


@dataclass(frozen=True, eq=False)  # compared by identity, which is fast: steps group their spans by head
class PoolingHead:
    """Pools the states of a sequence into one vector: float32 [B, H]."""

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
