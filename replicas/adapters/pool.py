"""Device memory for adapters: a fixed number of slots, each large enough for the largest adapter.

Letters: S slots, R the pool's rank (a multiple of 16), K input width, N output width, V vocabulary. Each slot is one
contiguous row, and `load` writes all of it: nothing of the previous adapter remains beside one of a smaller rank.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, product
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ranklet.kernels.packs import PACKS
from ranklet.kernels.stack import EmbeddingStack, LinearStack, SlotMeta, padded_rank
from ranklet.kernels.unpack import MOST_ELEMENTS, Destination, table, unpack
from ranklet.replicas.adapters.adapter import ColumnTerms
from ranklet.replicas.adapters.packed import PARTS, PackedAdapter, PackedLayout, layout_of
from ranklet.replicas.adapters.pinned_memory import staged
from ranklet.replicas.adapters.row_pool import RowPool
from ranklet.replicas.config import DEFAULT_TOKEN_ROWS
from ranklet.replicas.model.architecture import Architecture
from ranklet.replicas.model.decoder import Stacks
from ranklet.replicas.model.modules import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Module


@dataclass(frozen=True, slots=True, eq=False)
class SlotContents:
    """Modules that the adapter in a slot changes. Each load makes a new object, and objects compare by identity.

    Attributes:
        terms: whether some have column terms.
        rows: whether tokens have rows of their own.
        more_ids: whether it has token ids beyond the base model's.
    """

    modules: frozenset[Module]
    terms: bool = False
    rows: bool = False
    more_ids: bool = False


@dataclass
class AdapterPool:
    """All slots of one device.

    Attributes:
        layers: the stacks of each decoder layer.
        embedding: the token embedding's stack; None if `modules` leaves it out.
        head: the language-model head's stack; None if `modules` leaves it out.
        contents: contents of each slot.
        most_rows: number of tokens' own rows, of all slots together.
        added_tokens: number of token ids beyond the base model's.
        rows: the tokens' own rows.
    """

    architecture: Architecture
    slots: int
    max_rank: int
    modules: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    most_rows: int = DEFAULT_TOKEN_ROWS
    added_tokens: int = 0
    layers: list[Stacks] = field(init=False)
    embedding: EmbeddingStack | None = field(init=False, default=None)
    head: LinearStack | None = field(init=False, default=None)
    contents: list[SlotContents] = field(init=False)
    rows: RowPool = field(init=False)

    def __post_init__(self) -> None:
        self.rank = padded_rank(self.max_rank)
        self._packs = [pack for pack, names in PACKS.items() if set(names) & set(self.modules)]
        self._where = [(layer, pack) for layer in range(self.architecture.layers) for pack in self._packs]
        if EMBED_TOKENS in self.modules:
            self._where.append((EMBEDDING, EMBED_TOKENS))
        if LM_HEAD in self.modules:
            self._where.append((HEAD, LM_HEAD))
        self._destinations: dict[tuple[Module, str], Destination] = {}
        self._tables: WeakKeyDictionary[PackedLayout, Tensor] = WeakKeyDictionary()
        self.contents = [SlotContents(frozenset())] * self.slots
        self._data = torch.zeros((self.slots, self._place_matrices()), dtype=self.dtype, device=self.device)
        slices = (self.slots, sum(len(PARTS[part]) for _, part in self._where))
        self._ranks = torch.zeros(slices, dtype=torch.int32, device=self.device)
        self._scalings = torch.zeros(slices, dtype=torch.float32, device=self.device)
        self._stacks: dict[tuple[int, str], LinearStack] = {}
        self._parts: dict[tuple[int, str], LinearStack | EmbeddingStack] = {}  # in the order of columns of `_ranks`
        self._make_stacks()
        self.head = self._stacks.get((HEAD, LM_HEAD))
        self.layers = [
            Stacks(**{pack: self._stacks[layer, pack] for pack in self._packs})
            for layer in range(self.architecture.layers)
        ]
        self.rows = RowPool(self.slots, self.most_rows, self.architecture.hidden, self.device, self.dtype)
        self._terms_lock = Lock()
        self._terms: Tensor | None = None  # float32 [S, all gains and shifts], made for the first adapter with terms
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _place_matrices(self) -> int:
        """Place every matrix in a slot. Returns the slot's size in elements."""
        offset = 0
        for layer, part in self._where:
            for side, name in product("ab", PARTS[part]):
                wide, out = self.architecture.dims(name)
                a = (wide, self.rank) if layer == EMBEDDING else (self.rank, wide)
                rows, columns = a if side == "a" else (out, self.rank)
                self._destinations[(layer, name), side] = Destination(offset, rows, columns)
                offset += rows * columns
        return offset

    def _make_stacks(self) -> None:
        end = 0
        for layer, part in self._where:
            start, end = end, end + len(PARTS[part])
            a, b = self._matrices(layer, part, "a"), self._matrices(layer, part, "b")
            ranks, scalings = self._ranks[:, start:end], self._scalings[:, start:end]
            if layer == EMBEDDING:
                self.embedding = self._parts[layer, part] = EmbeddingStack(a, b, ranks, scalings)
            else:
                widths = tuple(self.architecture.dims(name)[1] for name in PARTS[part])
                self._stacks[layer, part] = self._parts[layer, part] = LinearStack(a, b, widths, ranks, scalings)

    def _matrices(self, layer: int, part: str, side: str) -> Tensor:
        """View one side of a part in every slot as a matrix: [S, rows, columns]."""
        places = [self._destinations[(layer, name), side] for name in PARTS[part]]
        begin, rows, columns = places[0].at, sum(place.rows for place in places), places[0].columns
        return self._data[:, begin : begin + rows * columns].view(self.slots, rows, columns)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + (0 if self._terms is None else self._terms.nbytes) + self.rows.nbytes

    @property
    def projections(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return the input width and the output widths of the slices, for each projection that has slots."""
        return tuple((stack.a.shape[2], stack.widths) for stack in self.stacks_of_one_layer())

    def stacks_of_one_layer(self) -> list[LinearStack]:
        """Return the first layer's stack of each projection."""
        return [self._stacks[0, pack] for pack in self._packs]

    def ranks(self, slot: int) -> dict[Module, int]:
        """Return the rank of each module that the slot's adapter targets."""
        return {
            (layer, name): rank
            for (layer, part), stack in self._parts.items()
            for name, rank in zip(PARTS[part], stack.meta[slot].ranks, strict=True)
            if rank
        }

    @contextmanager
    def placeholder_adapters(self, *, in_layers: bool = False, terms: bool = False) -> Iterator[None]:
        """Give every slot an adapter of zeros with full rank on every module, until the context ends.

        For the launches of a warm-up, before the first `load`.

        Args:
            in_layers: leave out the token embedding and the language-model head.
            terms: give them column terms and rows of their own too.
        """
        if terms:
            self._allocated_terms()
        sizes = {where: len(PARTS[where[1]]) for where in self._where if where[0] >= 0 or not in_layers}
        metas = {at: SlotMeta((self.rank,) * size, (1.0,) * size, terms) for at, size in sizes.items()}
        modules = frozenset(module for module, _ in self._destinations if module[0] >= 0 or not in_layers)
        for slot in range(self.slots):
            self._describe(slot, metas, SlotContents(modules, terms, terms, terms))
        try:
            yield
        finally:
            for slot in range(self.slots):
                self._describe(slot, {}, SlotContents(frozenset()))
            self._drop_terms()
            self.rows.drop_memory()

    def load(self, slot: int, packed: PackedAdapter) -> None:
        """Copy an adapter into a slot that no batch uses; blocks until the copy is complete.

        The copy runs on its own stream, so that batches on other slots go on.
        """
        if self._stream is None:
            self._write(slot, packed)
            return
        with torch.cuda.stream(self._stream):
            self._write(slot, packed)
            done = self._stream.record_event()
        done.synchronize()

    def compile_load(self) -> None:
        """Compile the kernel that `load` launches, by loading an empty adapter; call it before the first `load`."""
        self.load(0, PackedAdapter(0, torch.zeros(1, dtype=self.dtype), layout_of(()), {}, ()))

    def _write(self, slot: int, packed: PackedAdapter) -> None:
        """Launch all copies of a load. None waits: the device copies `flat` while Python launches the others."""
        flat, data, layout = packed.flat.to(self.device, non_blocking=True), self._data[slot], packed.layout
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
        self._write_terms(slot, packed.terms)
        self.rows.write(slot, packed.rows)
        modules = layout.modules.union(packed.terms)
        vocab = self.architecture.vocab
        more_ids = packed.rows.vocab(vocab) > vocab
        contents = SlotContents(modules, bool(packed.terms), bool(packed.rows), more_ids)
        self._describe(slot, packed.metas, contents)

    def _write_terms(self, slot: int, terms: Mapping[Module, ColumnTerms]) -> None:
        if not terms and not self.contents[slot].terms:
            return
        kept = self._allocated_terms()
        row, begin = torch.empty(kept.shape[1], pin_memory=kept.is_cuda), 0
        for (layer, part), stack in self._parts.items():
            own = row[begin : begin + 2 * stack.width].view(2, -1)
            own[0], own[1] = 1.0, 0.0
            begin += own.numel()
            first = 0
            for name in PARTS[part]:
                width = self.architecture.dims(name)[1]
                if (layer, name) in terms:
                    own[0, first : first + width] = terms[layer, name].gain
                    own[1, first : first + width] = terms[layer, name].shift
                first += width
        kept[slot].copy_(row, non_blocking=True)

    def _allocated_terms(self) -> Tensor:
        with self._terms_lock:  # loads run on several threads
            if self._terms is None:
                stacks = self._parts.values()
                sizes = [2 * stack.width for stack in stacks]
                with torch.inference_mode(False):
                    terms = torch.zeros((self.slots, sum(sizes)), device=self.device)
                for stack, part in zip(stacks, terms.split(sizes, dim=1), strict=True):
                    part[:, : stack.width] = 1.0
                    stack.terms = part.view(self.slots, 2, -1)
                self._terms = terms
            return self._terms

    def _drop_terms(self) -> None:
        self._terms = None
        for stack in self._parts.values():
            stack.terms = None

    def _filled_destinations(self, layout: PackedLayout) -> list[Destination]:
        """Return all matrices of a slot, each with the adapter's matrix that is copied into it."""
        filled = dict(self._destinations)
        for piece in layout.pieces:
            into = filled[piece.module, piece.side]
            filled[piece.module, piece.side] = Destination(*into[:3], piece.offset, *piece.shape, *piece.strides)
        return list(filled.values())

    def _describe(self, slot: int, metas: Mapping[tuple[int, str], SlotMeta], contents: SlotContents) -> None:
        """Set the ranks, scalings and contents of a slot; a part without metadata has rank 0."""
        for where, stack in self._parts.items():
            stack.meta[slot] = metas.get(where) or _empty_meta(len(stack.meta[slot].ranks))
        written = [stack.meta[slot] for stack in self._parts.values()]
        # One copy for all projections: the metadata of each stack is a view of some columns.
        ranks = torch.tensor([*chain(*(meta.ranks for meta in written))], dtype=torch.int32)
        scalings = torch.tensor([*chain(*(meta.scalings for meta in written))], dtype=torch.float32)
        self._ranks[slot].copy_(staged(ranks, self.device), non_blocking=True)
        self._scalings[slot].copy_(staged(scalings, self.device), non_blocking=True)
        self.contents[slot] = contents


@cache
def _empty_meta(slices: int) -> SlotMeta:
    return SlotMeta((0,) * slices, (0.0,) * slices)
