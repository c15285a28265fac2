"""The device memory that adapters live in: a fixed number of slots, each with room for the largest adapter.

Letters: S slots, R the pool's rank (a multiple of 16), K input width, N output width, V vocabulary. All of a slot lies
in one run of memory: `load` writes all of it, so that nothing of the last tenant can be left behind a smaller rank.
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
from ranklet.replicas.adapters.packed import PARTS, Layout, PackedAdapter, layout_of
from ranklet.replicas.adapters.verify import EMBEDDING, Module
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.decoder import Stacks


@dataclass(frozen=True, slots=True, eq=False)
class SlotContents:
    """What a slot holds since its last load; equal to itself alone."""

    places: frozenset[Module]


@dataclass
class AdapterPool:
    """All slots of one device.

    Attributes:
        layers: per decoder layer the stacks that the model reads.
        embedding: the token embedding's stack, None if `modules` leaves it out.
        tenants: who is in each slot.
    """

    architecture: Architecture
    slots: int
    max_rank: int
    modules: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    layers: list[Stacks] = field(init=False)
    embedding: EmbeddingStack | None = field(init=False, default=None)
    tenants: list[SlotContents] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = padded_rank(self.max_rank)
        self._stacks: dict[tuple[int, str], LinearStack] = {}
        self._rooms: dict[tuple[Module, str], Destination] = {}
        self._tables: WeakKeyDictionary[Layout, Tensor] = WeakKeyDictionary()
        self.tenants = [SlotContents(frozenset())] * self.slots
        self._data = torch.zeros((self.slots, self._slot_elements()), dtype=self.dtype, device=self.device)
        slices = (self.slots, self._slot_slices())
        self._ranks = torch.zeros(slices, dtype=torch.int32, device=self.device)
        self._scalings = torch.zeros(slices, dtype=torch.float32, device=self.device)
        self._carve()
        self._parts: dict[tuple[int, str], LinearStack | EmbeddingStack] = {**self._stacks}
        if self.embedding is not None:
            self._parts[EMBEDDING, "embed_tokens"] = self.embedding
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    @property
    def projections(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Input width and slices' output widths of each projection of a layer that has slots."""
        return tuple(self._pack_shape(names) for names in self._packs().values())

    def stacks_of_one_layer(self) -> list[LinearStack]:
        """A stack of each projection."""
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
        return total + (self.rank * (shape.vocab + shape.hidden) if "embed_tokens" in self.modules else 0)

    def _slot_slices(self) -> int:
        slices = sum(len(names) for names in self._packs().values()) * self.architecture.layers
        return slices + ("embed_tokens" in self.modules)

    def _matrices(self, offset: int, rows: int, columns: int) -> Tensor:
        """Of every slot, a matrix [S, rows, columns]."""
        return self._data[:, offset : offset + rows * columns].view(self.slots, rows, columns)

    def _carve(self) -> None:
        offset = column = 0

        def metadata(slices: int) -> tuple[Tensor, Tensor]:
            nonlocal column
            start, column = column, column + slices
            return self._ranks[:, start:column], self._scalings[:, start:column]

        for layer in range(self.architecture.layers):
            for pack_name, names in self._packs().items():
                wide, widths = self._pack_shape(names)
                for name in names:
                    self._rooms[(layer, name), "a"] = Destination(offset, self.rank, wide)
                    offset += self.rank * wide
                for name, width in zip(names, widths, strict=True):
                    self._rooms[(layer, name), "b"] = Destination(offset, width, self.rank)
                    offset += width * self.rank
                a = self._matrices(self._rooms[(layer, names[0]), "a"].at, len(names) * self.rank, wide)
                b = self._matrices(self._rooms[(layer, names[0]), "b"].at, sum(widths), self.rank)
                self._stacks[layer, pack_name] = LinearStack(a, b, widths, *metadata(len(widths)))
        self.layers = [
            Stacks(**{name: self._stacks[layer, name] for name in self._packs()})
            for layer in range(self.architecture.layers)
        ]
        if "embed_tokens" in self.modules:
            place, vocab, hidden = (EMBEDDING, "embed_tokens"), self.architecture.vocab, self.architecture.hidden
            self._rooms[place, "a"] = Destination(offset, vocab, self.rank)
            self._rooms[place, "b"] = Destination(offset + vocab * self.rank, hidden, self.rank)
            a, b = (self._matrices(*self._rooms[place, side][:3]) for side in "ab")
            self.embedding = EmbeddingStack(a, b, *metadata(1))

    @contextmanager
    def posing(self) -> Iterator[None]:
        """Meanwhile every slot looks as if an adapter of full rank on every module were in it, all of zeros.

        For launches whose results nobody reads; before the first `load`.
        """
        metas = [stack.meta for stack in self._parts.values()]
        before = [list(meta) for meta in metas]
        for meta in metas:
            meta[:] = [SlotMeta((self.rank,) * len(each.ranks), (1.0,) * len(each.ranks)) for each in meta]
        places = frozenset((layer, name) for layer, pack in self._stacks for name in PACKS[pack])
        self.tenants = [SlotContents(places) for _ in range(self.slots)]
        self._ranks.fill_(self.rank)
        self._scalings.fill_(1.0)
        try:
            yield
        finally:
            for meta, was in zip(metas, before, strict=True):
                meta[:] = was
            self.tenants = [SlotContents(frozenset()) for _ in range(self.slots)]
            self._ranks.zero_()
            self._scalings.zero_()

    def load(self, slot: int, packed: PackedAdapter) -> None:
        """Copy an adapter into a slot that no batch uses; returns when it is there.

        It runs on a stream of its own: batches on other slots go on.
        """
        if self._stream is None:
            self._write(slot, packed, packed.flat)
            return
        with torch.cuda.stream(self._stream):
            self._write(slot, packed, packed.flat.to(self.device, non_blocking=True))
            done = self._stream.record_event()
        done.synchronize()

    def rehearse(self) -> None:
        """Load nothing, so that what a load launches is compiled; before the first `load`."""
        self.load(0, PackedAdapter(0, torch.zeros(1, dtype=self.dtype), layout_of(()), {}, ()))

    def _write(self, slot: int, packed: PackedAdapter, flat: Tensor) -> None:
        data, layout = self._data[slot], packed.layout
        if data.is_cuda and len(data) < MOST_ELEMENTS:
            if layout not in self._tables:
                self._tables[layout] = table(self._furnished(layout), self.device)
            unpack(flat, data, self._tables[layout])
        else:
            data.zero_()
            for piece in layout.pieces:
                room = self._rooms[piece.place, piece.side]
                matrix = data[room.at : room.at + room.rows * room.columns].view(room.rows, room.columns)
                matrix[: piece.shape[0], : piece.shape[1]] = piece.view(flat)
        self._describe(slot, packed)
        self.tenants[slot] = SlotContents(layout.places)

    def _furnished(self, layout: Layout) -> list[Destination]:
        """All rooms of a slot, with what comes into them."""
        rooms = dict(self._rooms)
        for piece in layout.pieces:
            room = rooms[piece.place, piece.side]  # verification refuses adapters the pool has no room for
            rooms[piece.place, piece.side] = Destination(*room[:3], piece.offset, *piece.shape, *piece.strides)
        return list(rooms.values())

    def _describe(self, slot: int, packed: PackedAdapter) -> None:
        for where, stack in self._parts.items():
            stack.meta[slot] = packed.metas.get(where) or _nothing(len(stack.meta[slot].ranks))
        metas = [stack.meta[slot] for stack in self._parts.values()]
        # One copy for all projections: the stacks' tables are columns of these.
        self._ranks[slot] = torch.tensor([*chain(*(meta.ranks for meta in metas))], dtype=torch.int32)
        self._scalings[slot] = torch.tensor([*chain(*(meta.scalings for meta in metas))])


@cache
def _nothing(slices: int) -> SlotMeta:
    return SlotMeta((0,) * slices, (0.0,) * slices)
