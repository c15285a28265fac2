"""Computes Dense layers on pooled vectors, on the host in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ranklet.replicas.model.dense_settings import DenseSettings

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Tanh": torch.tanh,
    "ReLU": functional.relu,
    "GELU": functional.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": functional.silu,
}


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One layer with its weights.

    Attributes:
        weight: float32 [outputs, inputs].
        bias: float32 [outputs].
        projection: float32 [outputs, inputs], of the residual.
    """

    settings: DenseSettings
    weight: Tensor
    bias: Tensor | None = None
    projection: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.weight, self.bias, self.projection) if each is not None)

    def apply(self, vectors: Tensor) -> Tensor:
        found = functional.linear(vectors, self.weight, self.bias)
        if self.settings.activation in _ACTIVATIONS:
            found = _ACTIVATIONS[self.settings.activation](found)
        if self.settings.residual:
            found = found + (vectors if self.projection is None else functional.linear(vectors, self.projection))
        return found


@dataclass(frozen=True, eq=False)
class DenseLayers:
    """The layers of a model or adapter, in order. Without any, they are false."""

    layers: tuple[DenseLayer, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @torch.inference_mode()
    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs [n, outputs] of vectors [n, inputs]."""
        found = torch.from_numpy(vectors)
        for layer in self.layers:
            found = layer.apply(found)
        outputs: NDArray[np.float32] = found.numpy()
        return outputs
