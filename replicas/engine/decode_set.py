"""The decodes of a step. Steps in turn share one set as long as the same sequences decode."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef

if TYPE_CHECKING:
    from ranklet.replicas.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSet:
    """Sequences that compute one token in a step, which was their last output. Never changed.

    Attributes:
        sequences: oldest first.
        epochs: `Sequence.epoch` of each.
        rows: int32: row of each.
        adapters: their adapters, each once.
    """

    sequences: "list[Sequence]" = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    rows: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    adapters: list[AdapterRef] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: "Iterable[Sequence]") -> Self:
        found = list(sequences)
        rows = np.array([each.row for each in found], dtype=np.int32)
        # An adapter has one slot as long as sequences hold it. Numbers are hashed faster than adapters.
        adapters = {each.slot: each.adapter for each in found if each.adapter is not None}
        return cls(found, [each.epoch for each in found], rows, list(adapters.values()))
