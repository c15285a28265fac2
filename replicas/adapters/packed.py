"""An adapter packed for a copy into a slot: one flat buffer and a layout of the matrices in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ranklet.kernels.packs import PACKS
from ranklet.kernels.stack import SlotMeta
from ranklet.replicas.adapters.adapter import AdapterWeights, ColumnTerms
from ranklet.replicas.adapters.packed_rows import PackedRows, pack_rows
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable
from ranklet.replicas.adapters.vector_head import VectorHead
from ranklet.replicas.model.dense import DenseLayers
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, LM_HEAD, Module

_CACHED_LAYOUTS = 256
PARTS = {**PACKS, EMBED_TOKENS: (EMBED_TOKENS,), LM_HEAD: (LM_HEAD,)}  # the modules of each stack
_PART_OF = {name: part for part, names in PARTS.items() for name in names}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix of an adapter in its flat buffer.

    Attributes:
        side: "a" or "b".
        shape: rows and columns in a slot.
        transposed: whether the flat buffer has it column by column, such as the embedding's A.
    """

    module: Module
    side: str
    offset: int
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """Return the number of elements from row to row and from column to column."""
        return (1, self.shape[0]) if self.transposed else (self.shape[1], 1)

    def view(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The matrices of an adapter's flat buffer. `layout_of` makes it, once for equal pieces."""

    pieces: tuple[PackedMatrix, ...]
    modules: frozenset[Module] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", frozenset(piece.module for piece in self.pieces))


layout_of = lru_cache(_CACHED_LAYOUTS)(PackedLayout)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A verified adapter in the pool's dtype, in pinned memory if the pool is on a GPU.

    Attributes:
        metas: ranks and scalings by layer and part (a key of `PARTS`).
        modules: names of the modules that differ from the base model's, over all layers.
        terms: see `AdapterWeights`.
        rows: of tokens.
        end_ids: ids that end the adapter's texts, besides those of the base model.
        notes: see `AdapterWeights`.
        head: of a classifier, which stays on the host, like the next.
        dense: see `AdapterWeights`.
    """

    adapter_rank: int
    flat: Tensor
    layout: PackedLayout
    metas: dict[tuple[int, str], SlotMeta]
    modules: tuple[str, ...]
    terms: Mapping[Module, ColumnTerms] = field(default_factory=dict)
    rows: PackedRows = field(default_factory=PackedRows)
    end_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    head: VectorHead | None = None
    dense: DenseLayers | None = None

    @property
    def nbytes(self) -> int:
        others = (*self.terms.values(), self.rows, self.head, self.dense)
        return self.flat.nbytes + sum(each.nbytes for each in others if each is not None)


def pack(adapter: AdapterWeights, dtype: torch.dtype, allocate: Allocate = pageable) -> PackedAdapter:
    """Pack an adapter for a pool of this dtype. Shares the adapter's memory if that has the dtype already."""
    flat = adapter.flat
    if flat.dtype != dtype:
        flat = allocate(len(flat), dtype).copy_(flat)
    pieces = []
    for module, weight in adapter.weights.items():
        a, b = (weight.rank, weight.in_features), (weight.out_features, weight.rank)
        looked_up = module[0] == EMBEDDING  # a token's lookup reads one row of the slot's A
        pieces += [
            PackedMatrix(module, "a", weight.a_offset, a[::-1] if looked_up else a, looked_up != weight.transposed),
            PackedMatrix(module, "b", weight.b_offset, b, weight.transposed),
        ]
    names = {name for _, name in adapter.weights}
    names |= {name for name, own in ((EMBED_TOKENS, adapter.rows.embedding), (LM_HEAD, adapter.rows.head)) if own}
    modules = tuple(sorted(names))
    layout, metas = layout_of(tuple(pieces)), _metas(adapter)
    return PackedAdapter(
        adapter.rank, flat, layout, metas, modules, adapter.terms, pack_rows(adapter.rows, dtype, allocate),
        adapter.end_ids, adapter.notes, adapter.head, adapter.dense,
    )  # fmt: skip


def _metas(adapter: AdapterWeights) -> dict[tuple[int, str], SlotMeta]:
    found = {}
    for layer, part in dict.fromkeys((layer, _PART_OF[name]) for layer, name in (*adapter.weights, *adapter.terms)):
        weights = [adapter.weights.get((layer, name)) for name in PARTS[part]]
        ranks = tuple(weight.rank if weight else 0 for weight in weights)
        scalings = tuple(weight.scaling if weight else 0.0 for weight in weights)
        found[layer, part] = SlotMeta(ranks, scalings, any((layer, name) in adapter.terms for name in PARTS[part]))
    return found
