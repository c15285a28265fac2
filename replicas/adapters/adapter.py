"""A verified adapter in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.adapters.vector_head import VectorHead
from ranklet.replicas.model.dense import DenseLayers
from ranklet.replicas.model.modules import Module


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """A [rank, in_features] and B [out_features, rank] of one module, at two offsets of the adapter's flat weights.

    For the token embedding, in_features is the vocabulary.

    Attributes:
        transposed: whether both are stored as their transposes, as those of a head that shares the embedding's LoRA.
    """

    flat: Tensor
    a_offset: int
    b_offset: int
    rank: int
    in_features: int
    out_features: int
    scaling: float
    transposed: bool = False

    @property
    def a(self) -> Tensor:
        end = self.a_offset + self.rank * self.in_features
        return self._view(self.flat[self.a_offset : end], self.rank, self.in_features)

    @property
    def b(self) -> Tensor:
        end = self.b_offset + self.out_features * self.rank
        return self._view(self.flat[self.b_offset : end], self.out_features, self.rank)

    def _view(self, numbers: Tensor, rows: int, columns: int) -> Tensor:
        return numbers.view(columns, rows).t() if self.transposed else numbers.view(rows, columns)


@dataclass(frozen=True, slots=True)
class ColumnTerms:
    """What DoRA and trained biases make of a module's output y: `gain * y + shift`, by column."""

    gain: Tensor  # float32 [out_features]
    shift: Tensor  # float32 [out_features]

    @property
    def nbytes(self) -> int:
        return self.gain.nbytes + self.shift.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class OwnRows:
    """Rows of the token embedding or the head that take the place of the base model's, complete with LoRA."""

    ids: Tensor  # int32 [rows], increasing: the token of each row
    rows: Tensor  # [rows, hidden], in the base model's dtype


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRows:
    """The rows of an adapter; None where it has the base model's.

    A tied head shares the object of the embedding, unless LoRA completes either.
    """

    embedding: OwnRows | None = None
    head: OwnRows | None = None

    def __bool__(self) -> bool:
        return self.embedding is not None or self.head is not None

    def vocab(self, base: int) -> int:
        """Return the number of token ids of the adapter, given that of the base model."""
        return base if self.embedding is None else max(base, int(self.embedding.ids[-1]) + 1)

    @property
    def distinct(self) -> list[OwnRows]:
        return list(dict.fromkeys(own for own in (self.embedding, self.head) if own is not None))

    @property
    def nbytes(self) -> int:
        return sum(own.ids.nbytes + own.rows.nbytes for own in self.distinct)


@dataclass(frozen=True)
class AdapterWeights:
    """A verified adapter.

    Attributes:
        flat: its weights end to end in the base model's dtype, on the CPU.
        weights: where each one is.
        terms: of the modules that have any, also of some without LoRA; on the CPU.
        rows: of tokens, on the CPU.
        end_ids: ids that end its texts, besides those of the base model.
        notes: what its folder has instead of the base model's settings, and what of it is not used.
        head: of a classifier.
        dense: layers on its vectors, perhaps none; None for those of the base model.
        invocation: as in `AdapterRef`.
    """

    ref: AdapterRef
    flat: Tensor
    weights: dict[Module, LoraWeight]
    terms: Mapping[Module, ColumnTerms] = field(default_factory=dict)
    rows: AdapterRows = field(default_factory=AdapterRows)
    end_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    head: VectorHead | None = None
    dense: DenseLayers | None = None
    invocation: Invocation | None = None

    @property
    def rank(self) -> int:
        """Return the largest rank of any module; 0 if the base model uses none of them, such as an unused head."""
        return max((weight.rank for weight in self.weights.values()), default=0)
