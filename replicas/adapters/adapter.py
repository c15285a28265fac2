"""A verified adapter in host memory."""

from dataclasses import dataclass

from torch import Tensor

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.model.modules import Module


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """A [rank, in_features] and B [out_features, rank] of one module, at two offsets of the adapter's flat weights.

    For the token embedding, in_features is the vocabulary.
    """

    flat: Tensor
    a_offset: int
    b_offset: int
    rank: int
    in_features: int
    out_features: int
    scaling: float

    @property
    def a(self) -> Tensor:
        end = self.a_offset + self.rank * self.in_features
        return self.flat[self.a_offset : end].view(self.rank, self.in_features)

    @property
    def b(self) -> Tensor:
        end = self.b_offset + self.out_features * self.rank
        return self.flat[self.b_offset : end].view(self.out_features, self.rank)


@dataclass(frozen=True)
class AdapterWeights:
    """A verified adapter: its weights end to end in the base model's dtype, on the CPU, and where each one is."""

    ref: AdapterRef
    flat: Tensor
    weights: dict[Module, LoraWeight]

    @property
    def rank(self) -> int:
        """Return the largest rank of any module."""
        return max(weight.rank for weight in self.weights.values())
