"""An adapter as it waits in host memory for a slot: one flat buffer, and where its matrices stand in it."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ranklet.kernels.packs import PACKS
from ranklet.kernels.stack import SlotMeta
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable
from ranklet.replicas.adapters.verify import EMBEDDING, AdapterWeights, Module

_LAYOUTS = 256  # that are remembered
PARTS = {**PACKS, "embed_tokens": ("embed_tokens",)}  # what a stack is of
_PART_OF = {name: part for part, names in PARTS.items() for name in names}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one matrix of an adapter stands in its flat buffer. The embedding's A is saved transposed."""

    place: Module
    side: str
    offset: int
    shape: tuple[int, int]

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from row to row and from column to column; of the embedding's A, a token is a row."""
        transposed = self.place[0] == EMBEDDING and self.side == "a"
        return (1, self.shape[0]) if transposed else (self.shape[1], 1)

    def view(self, flat: Tensor) -> Tensor:
        """The matrix [shape]."""
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the matrices of an adapter stand; one object for all adapters with the same."""

    pieces: tuple[Piece, ...]
    places: frozenset[Module] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", frozenset(piece.place for piece in self.pieces))


layout_of = lru_cache(_LAYOUTS)(Layout)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A verified adapter ready to be copied to a slot: one flat buffer, pinned where there is a GPU."""

    adapter_rank: int
    flat: Tensor
    layout: Layout
    metas: dict[tuple[int, str], SlotMeta]  # by layer and part
    modules: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def pack(adapter: AdapterWeights, dtype: torch.dtype, allocate: Allocate = pageable) -> PackedAdapter:
    """An adapter ready to be copied, in its own memory where that is of the pool's dtype."""
    flat = adapter.flat
    if flat.dtype != dtype:
        flat = allocate(len(flat), dtype).copy_(flat)
    pieces = []
    for place, weight in adapter.weights.items():
        a = (weight.wide, weight.rank) if place[0] == EMBEDDING else (weight.rank, weight.wide)
        pieces += [Piece(place, "a", weight.a_at, a), Piece(place, "b", weight.b_at, (weight.out, weight.rank))]
    modules = tuple(sorted({name for _, name in adapter.weights}))
    return PackedAdapter(adapter.rank, flat, layout_of(tuple(pieces)), _metas(adapter), modules)


def _metas(adapter: AdapterWeights) -> dict[tuple[int, str], SlotMeta]:
    found = {}
    for layer, part in dict.fromkeys((layer, _PART_OF[name]) for layer, name in adapter.weights):
        weights = [adapter.weights.get((layer, name)) for name in PARTS[part]]
        ranks = tuple(weight.rank if weight else 0 for weight in weights)
        found[layer, part] = SlotMeta(ranks, tuple(weight.scaling if weight else 0.0 for weight in weights))
    return found
