"""The device memory that adapters live in: a fixed number of slots, each with room for the largest adapter.

Letters: S slots, R the pool's rank (a multiple of 16), K input width, N output width, V vocabulary. All of a slot lies
in one run of memory: `load` zeroes the run and then copies the adapter in, so that nothing of the last tenant can be
left behind a smaller rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ranklet.kernels.stack import PACKS, EmbeddingStack, LinearStack, SlotMeta, padded_rank
from ranklet.replicas.adapters import EMBEDDING, Adapter, Place
from ranklet.replicas.architecture import Architecture
from ranklet.replicas.model import Stacks


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one matrix of an adapter stands in its flat buffer. The embedding's A is saved transposed."""

    place: Place
    side: str
    offset: int
    shape: tuple[int, int]

    def view(self, flat: Tensor) -> Tensor:
        """The matrix [shape]; of the embedding's A, a token is a row."""
        run = flat[self.offset : self.offset + self.shape[0] * self.shape[1]]
        transposed = self.place[0] == EMBEDDING and self.side == "a"
        return run.view(self.shape[::-1]).t() if transposed else run.view(self.shape)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A verified adapter ready to be copied to a slot: one flat buffer, pinned where there is a GPU."""

    adapter_rank: int
    flat: Tensor
    pieces: tuple[Piece, ...]
    scalings: dict[Place, float]
    modules: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def pack(adapter: Adapter, dtype: torch.dtype, *, pinned: bool) -> PackedAdapter:
    """An adapter ready to be copied; its own memory where that is of the pool's dtype, and pinned if that is asked."""
    flat = adapter.flat
    if flat.dtype != dtype or (pinned and not flat.is_pinned()):
        flat = torch.empty(len(flat), dtype=dtype, pin_memory=pinned).copy_(flat)
    pieces = []
    for place, weight in adapter.weights.items():
        a = (weight.wide, weight.rank) if place[0] == EMBEDDING else (weight.rank, weight.wide)
        pieces += [Piece(place, "a", weight.a_at, a), Piece(place, "b", weight.b_at, (weight.out, weight.rank))]
    scalings = {place: weight.scaling for place, weight in adapter.weights.items()}
    modules = tuple(sorted({name for _, name in adapter.weights}))
    return PackedAdapter(adapter.rank, flat, tuple(pieces), scalings, modules)


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """What a slot holds since its last load; equal to itself alone."""

    places: frozenset[Place]


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
    tenants: list[Tenant] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = padded_rank(self.max_rank)
        self._stacks: dict[tuple[int, str], LinearStack] = {}
        self.tenants = [Tenant(frozenset())] * self.slots
        self._data = torch.zeros((self.slots, self._slot_elements()), dtype=self.dtype, device=self.device)
        slices = (self.slots, self._slot_slices())
        self._ranks = torch.zeros(slices, dtype=torch.int32, device=self.device)
        self._scalings = torch.zeros(slices, dtype=torch.float32, device=self.device)
        self._carve()
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

    def ranks(self, slot: int) -> dict[Place, int]:
        """The rank of each module that the slot's adapter targets."""
        found = {
            (layer, name): rank
            for (layer, pack_name), stack in self._stacks.items()
            for name, rank in zip(PACKS[pack_name], stack.meta[slot].ranks, strict=True)
            if rank
        }
        if self.embedding is not None and any(self.embedding.meta[slot].ranks):
            found[EMBEDDING, "embed_tokens"] = self.embedding.meta[slot].ranks[0]
        return found

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

    def _carve(self) -> None:
        offset = column = 0

        def take(rows: int, columns: int) -> Tensor:
            nonlocal offset
            start, offset = offset, offset + rows * columns
            return self._data[:, start:offset].view(self.slots, rows, columns)

        def metadata(slices: int) -> tuple[Tensor, Tensor]:
            nonlocal column
            start, column = column, column + slices
            return self._ranks[:, start:column], self._scalings[:, start:column]

        for layer in range(self.architecture.layers):
            for pack_name, names in self._packs().items():
                wide, widths = self._pack_shape(names)
                a, b = take(len(widths) * self.rank, wide), take(sum(widths), self.rank)
                self._stacks[layer, pack_name] = LinearStack(a, b, widths, *metadata(len(widths)))
        self.layers = [
            Stacks(**{name: self._stacks[layer, name] for name in self._packs()})
            for layer in range(self.architecture.layers)
        ]
        if "embed_tokens" in self.modules:
            a, b = take(self.architecture.vocab, self.rank), take(self.architecture.hidden, self.rank)
            self.embedding = EmbeddingStack(a, b, *metadata(1))

    @contextmanager
    def posing(self) -> Iterator[None]:
        """Meanwhile every slot looks as if an adapter of full rank on every module were in it, all of zeros.

        For launches whose results nobody reads; before the first `load`.
        """
        metas = [stack.meta for stack in self._stacks.values()]
        if self.embedding is not None:
            metas.append(self.embedding.meta)
        before = [list(meta) for meta in metas]
        for meta in metas:
            meta[:] = [SlotMeta((self.rank,) * len(each.ranks), (1.0,) * len(each.ranks)) for each in meta]
        places = frozenset((layer, name) for layer, pack in self._stacks for name in PACKS[pack])
        self.tenants = [Tenant(places) for _ in range(self.slots)]
        self._ranks.fill_(self.rank)
        self._scalings.fill_(1.0)
        try:
            yield
        finally:
            for meta, was in zip(metas, before, strict=True):
                meta[:] = was
            self.tenants = [Tenant(frozenset()) for _ in range(self.slots)]
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

    def _write(self, slot: int, packed: PackedAdapter, flat: Tensor) -> None:
        self._data[slot].zero_()
        targets = [self._target(slot, piece) for piece in packed.pieces]
        torch._foreach_copy_(targets, [piece.view(flat) for piece in packed.pieces])
        self._describe(slot, packed)
        self.tenants[slot] = Tenant(frozenset(packed.scalings))

    def _target(self, slot: int, piece: Piece) -> Tensor:
        layer, name = piece.place
        if layer == EMBEDDING:
            assert self.embedding is not None  # verification refuses adapters the pool has no room for
            side = self.embedding.a if piece.side == "a" else self.embedding.b
            return side[slot, :, : piece.shape[1]]
        pack_name, index = _slice_of(name)
        stack = self._stacks[layer, pack_name]
        if piece.side == "a":
            return stack.a[slot, index * self.rank : index * self.rank + piece.shape[0]]
        column = sum(stack.widths[:index])
        return stack.b[slot, column : column + stack.widths[index], : piece.shape[1]]

    def _describe(self, slot: int, packed: PackedAdapter) -> None:
        ranks = {piece.place: piece.shape[1] for piece in packed.pieces if piece.side == "b"}
        metas = []
        for (layer, pack_name), stack in self._stacks.items():
            stack.meta[slot] = _meta([(layer, name) for name in PACKS[pack_name]], ranks, packed)
            metas.append(stack.meta[slot])
        if self.embedding is not None:
            self.embedding.meta[slot] = _meta([(EMBEDDING, "embed_tokens")], ranks, packed)
            metas.append(self.embedding.meta[slot])
        # One copy for all projections: the stacks' tables are columns of these.
        self._ranks[slot] = torch.tensor([rank for meta in metas for rank in meta.ranks], dtype=torch.int32)
        self._scalings[slot] = torch.tensor([scaling for meta in metas for scaling in meta.scalings])


def _meta(places: list[Place], ranks: dict[Place, int], packed: PackedAdapter) -> SlotMeta:
    return SlotMeta(
        tuple(ranks.get(place, 0) for place in places), tuple(packed.scalings.get(place, 0.0) for place in places)
    )


def _slice_of(name: str) -> tuple[str, int]:
    return next((pack_name, names.index(name)) for pack_name, names in PACKS.items() if name in names)
