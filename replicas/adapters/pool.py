"""Device memory for adapters: a fixed number of slots, each large enough for the largest adapter.

Letters: S slots, R the pool's rank (a multiple of 16), K input width, N output width, V vocabulary. Each slot is one
contiguous row, and `load` writes all of it: nothing of the previous adapter remains beside one of a smaller rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ranklet.kernels.packs import PACKS
from ranklet.kernels.stack import EmbeddingStack, LinearStack, SlotMeta, padded_rank
from ranklet.kernels.unpack import MOST_ELEMENTS, Destination, table, unpack
from ranklet.replicas.adapters.packed import PARTS, PackedAdapter, PackedLayout, layout_of
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.decoder import Stacks
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, Module


@dataclass(frozen=True, slots=True, eq=False)
class SlotContents:
    """Modules that the adapter in a slot targets. Each load makes a new object, and objects compare by identity."""

    modules: frozenset[Module]


_EMPTY = SlotContents(frozenset())


@dataclass
class AdapterPool:
    """All slots of one device.

    Attributes:
        layers: the stacks of each decoder layer.
        embedding: the token embedding's stack; None if `modules` leaves it out.
        contents: contents of each slot.
    """

    architecture: Architecture
    slots: int
    max_rank: int
    modules: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    layers: list[Stacks] = field(init=False)
    embedding: EmbeddingStack | None = field(init=False, default=None)
    contents: list[SlotContents] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = padded_rank(self.max_rank)
        self._stacks: dict[tuple[int, str], LinearStack] = {}
        self._destinations: dict[tuple[Module, str], Destination] = {}
        self._tables: WeakKeyDictionary[PackedLayout, Tensor] = WeakKeyDictionary()
        self.contents = [_EMPTY] * self.slots
        self._data = torch.zeros((self.slots, self._slot_elements()), dtype=self.dtype, device=self.device)
        slices = (self.slots, self._slot_slices())
        self._ranks = torch.zeros(slices, dtype=torch.int32, device=self.device)
        self._scalings = torch.zeros(slices, dtype=torch.float32, device=self.device)
        self._make_stacks()
        self._parts: dict[tuple[int, str], LinearStack | EmbeddingStack] = {**self._stacks}
        if self.embedding is not None:
            self._parts[EMBEDDING, EMBED_TOKENS] = self.embedding
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    @property
    def projections(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Input width and output widths of the slices, for each projection of a layer that has slots."""
        return tuple(self._pack_shape(names) for names in self._packs().values())

    def stacks_of_one_layer(self) -> list[LinearStack]:
        """The first layer's stack of each projection."""
        return [self._stacks[0, pack] for pack in self._packs()]

    def ranks(self, slot: int) -> dict[Module, int]:
        """The rank of each module that the slot's adapter targets."""
        return {
            (layer, name): rank
            for (layer, part), stack in self._parts.items()
            for name, rank in zip(PARTS[part], stack.meta[slot].ranks, strict=True)
            if rank
        }

    def _packs(self) -> dict[str, tuple[str, ...]]:
        return {pack: names for pack, names in PACKS.items() if set(names) & set(self.modules)}

    def _pack_shape(self, names: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
        dims = [self.architecture.module_dims()[name] for name in names]
        return dims[0][0], tuple(out for _, out in dims)

    def _slot_elements(self) -> int:
        shape, total = self.architecture, 0
        for names in self._packs().values():
            wide, widths = self._pack_shape(names)
            total += self.rank * (len(widths) * wide + sum(widths)) * shape.layers
        return total + (self.rank * (shape.vocab + shape.hidden) if EMBED_TOKENS in self.modules else 0)

    def _slot_slices(self) -> int:
        slices = sum(len(names) for names in self._packs().values()) * self.architecture.layers
        return slices + (EMBED_TOKENS in self.modules)

    def _matrices(self, offset: int, rows: int, columns: int) -> Tensor:
        """View the same part of every slot as a matrix: [S, rows, columns]."""
        return self._data[:, offset : offset + rows * columns].view(self.slots, rows, columns)

    def _make_stacks(self) -> None:
        offset = column = 0

        def metadata(slices: int) -> tuple[Tensor, Tensor]:
            nonlocal column
            start, column = column, column + slices
            return self._ranks[:, start:column], self._scalings[:, start:column]

        for layer in range(self.architecture.layers):
            for pack_name, names in self._packs().items():
                wide, widths = self._pack_shape(names)
                for name in names:
                    self._destinations[(layer, name), "a"] = Destination(offset, self.rank, wide)
                    offset += self.rank * wide
                for name, width in zip(names, widths, strict=True):
                    self._destinations[(layer, name), "b"] = Destination(offset, width, self.rank)
                    offset += width * self.rank
                a = self._matrices(self._destinations[(layer, names[0]), "a"].at, len(names) * self.rank, wide)
                b = self._matrices(self._destinations[(layer, names[0]), "b"].at, sum(widths), self.rank)
                self._stacks[layer, pack_name] = LinearStack(a, b, widths, *metadata(len(widths)))
        self.layers = [
            Stacks(**{name: self._stacks[layer, name] for name in self._packs()})
            for layer in range(self.architecture.layers)
        ]
        if EMBED_TOKENS in self.modules:
            module, vocab, hidden = (EMBEDDING, EMBED_TOKENS), self.architecture.vocab, self.architecture.hidden
            self._destinations[module, "a"] = Destination(offset, vocab, self.rank)
            self._destinations[module, "b"] = Destination(offset + vocab * self.rank, hidden, self.rank)
            a, b = (self._matrices(*self._destinations[module, side][:3]) for side in "ab")
            self.embedding = EmbeddingStack(a, b, *metadata(1))

    @contextmanager
    def placeholder_adapters(self) -> Iterator[None]:
        """Within the context every slot holds an adapter of zeros with full rank on every module.

        For the launches of a warm-up, before the first `load`.
        """
        metas = [stack.meta for stack in self._parts.values()]
        before = [list(meta) for meta in metas]
        for meta in metas:
            meta[:] = [SlotMeta((self.rank,) * len(each.ranks), (1.0,) * len(each.ranks)) for each in meta]
        modules = frozenset((layer, name) for layer, pack in self._stacks for name in PACKS[pack])
        self.contents = [SlotContents(modules) for _ in range(self.slots)]
        self._ranks.fill_(self.rank)
        self._scalings.fill_(1.0)
        try:
            yield
        finally:
            for meta, was in zip(metas, before, strict=True):
                meta[:] = was
            self.contents = [_EMPTY] * self.slots
            self._ranks.zero_()
            self._scalings.zero_()

    def load(self, slot: int, packed: PackedAdapter) -> None:
        """Copy an adapter into a slot that no batch uses; blocks until the copy is complete.

        The copy runs on its own stream, so that batches on other slots go on.
        """
        if self._stream is None:
            self._write(slot, packed, packed.flat)
            return
        with torch.cuda.stream(self._stream):
            self._write(slot, packed, packed.flat.to(self.device, non_blocking=True))
            done = self._stream.record_event()
        done.synchronize()

    def compile_load(self) -> None:
        """Compile the kernel that `load` launches, by loading an empty adapter; call it before the first `load`."""
        self.load(0, PackedAdapter(0, torch.zeros(1, dtype=self.dtype), layout_of(()), {}, ()))

    def _write(self, slot: int, packed: PackedAdapter, flat: Tensor) -> None:
        data, layout = self._data[slot], packed.layout
        if data.is_cuda and len(data) < MOST_ELEMENTS:
            if layout not in self._tables:
                self._tables[layout] = table(self._filled_destinations(layout), self.device)
            unpack(flat, data, self._tables[layout])
        else:
            data.zero_()
            for piece in layout.pieces:
                into = self._destinations[piece.module, piece.side]
                matrix = data[into.at : into.at + into.rows * into.columns].view(into.rows, into.columns)
                matrix[: piece.shape[0], : piece.shape[1]] = piece.view(flat)
        self._describe(slot, packed)
        self.contents[slot] = SlotContents(layout.modules)

    def _filled_destinations(self, layout: PackedLayout) -> list[Destination]:
        """All matrices of a slot, each with the adapter's matrix that is copied into it."""
        filled = dict(self._destinations)
        for piece in layout.pieces:
            into = filled[piece.module, piece.side]
            filled[piece.module, piece.side] = Destination(*into[:3], piece.offset, *piece.shape, *piece.strides)
        return list(filled.values())

    def _describe(self, slot: int, packed: PackedAdapter) -> None:
        for where, stack in self._parts.items():
            stack.meta[slot] = packed.metas.get(where) or _empty_meta(len(stack.meta[slot].ranks))
        metas = [stack.meta[slot] for stack in self._parts.values()]
        # One copy for all projections: the metadata of each stack is a view of some columns.
        self._ranks[slot] = torch.tensor([*chain(*(meta.ranks for meta in metas))], dtype=torch.int32)
        self._scalings[slot] = torch.tensor([*chain(*(meta.scalings for meta in metas))])


@cache
def _empty_meta(slices: int) -> SlotMeta:
    return SlotMeta((0,) * slices, (0.0,) * slices)
