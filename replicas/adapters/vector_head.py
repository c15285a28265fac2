"""A linear layer on pooled vectors, such as the head of a classifier. Imports no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class VectorHead:
    """Computes W x + b in float32.

    Attributes:
        weight: W, float32 [outputs, hidden].
        bias: b, float32 [outputs].
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the outputs [n, outputs] of vectors [n, hidden]."""
        product = vectors @ self.weight.T
        return product if self.bias is None else product + self.bias
