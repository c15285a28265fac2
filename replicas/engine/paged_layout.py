"""Packs the arrays of a step with pages into a single buffer, so that they reach the device in one copy.

A step's items are its decodes, one token each, and then its spans. Their tokens are packed in the order of their
adapters. Sizes are rounded up, so that steps of similar size share a CUDA graph; the values of fillers are such that
they read nothing and write nothing that is used.

Letters: T tokens, D decodes, C spans whose keys are in pages, F spans whose keys are all in the step, P pages a
sequence, S outputs that are drawn tokens, E outputs that are pooled, fillers included in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranklet.kernels.batch import LoraBatch, plan_arrays
from ranklet.kernels.paged_spans import PagedSpans, PrefixGroups
from ranklet.kernels.powers import power_of_four, power_of_two
from ranklet.kernels.row_subset import subset
from ranklet.kernels.sampling_row import ROW_WIDTH, Column, Feature, features_of, rounded
from ranklet.replicas.cache.pages import pages_of
from ranklet.replicas.engine.bucket import rounded_pages, rounded_rows, rounded_step
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.prefix_groups import LEAST_SPANS, group_by_prefix
from ranklet.replicas.engine.row_table import RowTable
from ranklet.replicas.engine.scored_span import ScoredSpan
from ranklet.replicas.engine.tile_tables import TileShapes, all_tiles, placed, shapes_of, tiled
from ranklet.replicas.model.heads import Head, TextHead

SHORT_STEP = 2048  # tokens of a step with prompts
_SHORT_PROMPT = 1024  # tokens of a prompt for which attention over pages takes little longer than cuDNN's
_LEAST_POOLED = 16  # of a step with pieces of prompts, so that embeddings beside texts need no graphs of their own


@dataclass(frozen=True, slots=True)
class StepItems:
    """The decodes and spans of a step.

    Attributes:
        decodes: int32 [decodes]: rows of the sequences that compute their last token.
        spans: prompts and pieces of prompts.
        slots: pool slot of each span's adapter; None for the base model.
    """

    decodes: NDArray[np.int32]
    spans: Sequence[TokenSpan]
    slots: Sequence[int | None]

    def lora(self, table: RowTable) -> tuple[NDArray[np.int64], LoraBatch]:
        """Return the items in the order of their adapters, and the LoRA batch of that order."""
        slots = np.array([-1 if slot is None else slot for slot in self.slots], dtype=np.int64)
        return plan_arrays(self.lengths, np.concatenate((table.slots[self.decodes], slots)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each item."""
        lengths = np.ones(len(self.decodes) + len(self.spans), dtype=np.int64)
        lengths[len(self.decodes) :] = [len(span.ids) for span in self.spans]
        return lengths


@dataclass(frozen=True, slots=True)
class LayoutSizes:
    """Sizes of the arrays of a layout, a part of the key of its CUDA graph."""

    tokens: int
    decodes: int
    chunks: int
    fresh: int
    longest_fresh: int
    pages: int
    drawn: int
    pooled: int

    @property
    def has_groups(self) -> bool:
        """Whether attention reads pages that decodes share once a group."""
        return self.decodes >= LEAST_SPANS


@dataclass(slots=True)
class PagedArrays:
    """The arrays of a layout, on the host or on the device."""

    ids: Tensor  # int32 [T]; -(row + 1) stands for the last token of a row
    positions: Tensor  # int32 [T]
    kv_slots: Tensor  # int32 [T]: where keys and values go: page * PAGE_TOKENS + offset; -1: nowhere
    decodes: PagedSpans | None
    chunks: PagedSpans | None
    fresh_starts: Tensor  # int32 [F]: first packed token
    fresh_offsets: Tensor  # int32 [F + 1]: cumulative lengths
    drawn: Tensor  # int32 [S]: packed token that each drawn token follows
    columns: Tensor  # int32 [S, columns]: sampling values
    pooled: Tensor  # int32 [E]: packed token that each pooled output reads
    lora: LoraBatch
    drawn_lora: LoraBatch | None


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """A packed step with pages.

    Attributes:
        drawn_items: the item of each drawn token, in the order of the outputs.
        pooled_items: the item of each pooled output.
        pooled_heads: the head of each of `pooled_items`.
        fresh_lengths: tokens of each span whose keys are all in the step, in the order of their tokens.
        features: what the drawn tokens ask of the sampler.
        scored: tokens of prompts whose logprobs are computed.
        lora: LoRA of every token.
        drawn_lora: LoRA of the drawn tokens; None if no adapter of the step changes the head.
        buffer: int32: all arrays, end to end. Pinned for a GPU.
    """

    sizes: LayoutSizes
    drawn_items: list[int]
    pooled_items: list[int]
    pooled_heads: list[Head]
    features: Feature
    lora: LoraBatch
    drawn_lora: LoraBatch | None
    buffer: Tensor
    fresh_lengths: tuple[int, ...]
    scored: list[ScoredSpan]
    _shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def only_decodes(self) -> bool:
        return not self.sizes.chunks and not self.sizes.fresh

    @property
    def tile_shapes(self) -> TileShapes:
        return shapes_of(self.lora, self.drawn_lora)

    def unpack(self, moved: Tensor) -> PagedArrays:
        parts = iter(moved.split([int(np.prod(shape)) for shape in self._shapes]))
        arrays = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        ids, positions, kv_slots, *arrays = arrays
        d_counts, d_rows, d_lengths, d_table, d_shared, d_firsts, d_members, *arrays = arrays
        c_rows, c_counts, c_lengths, c_table, *arrays = arrays
        starts, offsets, drawn, columns, pooled, *tables = arrays
        size = self.sizes
        groups = PrefixGroups(d_shared, d_firsts, d_members) if size.has_groups else None
        lora, drawn_lora = placed(self.lora, self.drawn_lora, tables)
        return PagedArrays(
            ids, positions, kv_slots,
            PagedSpans(d_rows, d_counts, d_lengths, d_table, 1, groups) if size.decodes else None,
            PagedSpans(c_rows, c_counts, c_lengths, c_table, size.tokens) if size.chunks else None,
            starts, offsets, drawn, columns, pooled, lora, drawn_lora,
        )  # fmt: skip


class LayoutPacker:
    """Packs steps of one engine.

    Args:
        pads: whether sizes are rounded up, for CUDA graphs.
        adapts_head: whether the language-model head has LoRA slots.
        group_limit: the most decodes of which attention reads common pages at once.
    """

    def __init__(
        self, table: RowTable, *, max_tokens: int, pads: bool, pinned: bool, adapts_head: bool, group_limit: int
    ) -> None:
        self._table = table
        self._max_tokens = max_tokens
        self.pads = pads
        self._pinned = pinned
        self._adapts_head = adapts_head
        self._group_limit = group_limit

    def pack(self, items: StepItems, order: NDArray[np.int64], lora: LoraBatch) -> PagedLayout:
        """Pack a step. `order` and `lora` are those of `items.lora`, with the backend chosen."""
        table, decodes, spans = self._table, items.decodes, items.spans
        count = len(decodes)
        lengths = items.lengths
        starts = np.empty(len(lengths), dtype=np.int64)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        # Beside decodes and later pieces, a prompt's first piece reads its keys from pages too: steps have fewer sizes.
        # So do short prompts.
        short = self.pads and (lora.rows <= SHORT_STEP or int(lengths.max()) <= _SHORT_PROMPT)
        mixed = short or count > 0 or any(span.start for span in spans)
        chunks = [i for i, span in enumerate(spans, count) if span.row is not None and mixed]
        fresh = [i for i, span in enumerate(spans, count) if span.row is None or not mixed]
        fresh.sort(key=starts.__getitem__)
        texts = [i for i, span in enumerate(spans, count) if isinstance(span.head, TextHead)]
        drawn = np.concatenate((np.arange(count), np.array(texts, dtype=np.int64)))
        drawn_at = starts[drawn] + lengths[drawn] - 1
        by_row = drawn_at.argsort()
        drawn, drawn_at = drawn[by_row], drawn_at[by_row]
        embedded = {
            i: span.head
            for i, span in enumerate(spans, count)
            if span.head is not None and not isinstance(span.head, TextHead)
        }
        pooled, pooled_heads = list(embedded), list(embedded.values())
        sizes = self._sizes(int(lengths.sum()), decodes, lengths, chunks, fresh, len(drawn), len(pooled), spans, count)

        ids = np.zeros(sizes.tokens, dtype=np.int32)
        positions = np.zeros(sizes.tokens, dtype=np.int32)
        kv_slots = np.full(sizes.tokens, -1, dtype=np.int32)
        at = starts[:count]
        ids[at] = -1 - decodes
        place = table.lengths[decodes] - 1
        positions[at] = place
        kv_slots[at] = table.page_slots(decodes, place)
        limit = self._group_limit if sizes.has_groups else 1
        decoding = group_by_prefix(at, place + 1, table.pages[decodes, : sizes.pages], limit)
        for i, span in enumerate(spans, count):
            rows = slice(starts[i], starts[i] + lengths[i])
            ids[rows] = span.ids
            positions[rows] = np.arange(span.start, span.start + lengths[i], dtype=np.int32)
            if span.row is not None:
                kv_slots[rows] = table.page_slots(span.row, positions[rows])
        chunk_rows = np.asarray([spans[i - count].row for i in chunks], dtype=np.int64)
        counts = lengths[chunks]
        behind = np.asarray([spans[i - count].start for i in chunks], dtype=np.int64) + counts
        columns = self._columns(drawn, decodes, place, spans, count, sizes.drawn)
        offsets = np.full(sizes.fresh + 1, lengths[fresh].sum())
        offsets[: len(fresh) + 1] = np.cumsum((0, *lengths[fresh]))
        lora = tiled(lora, sizes.tokens, padded=self.pads, everywhere=self.pads and sizes.tokens <= SHORT_STEP)
        scored = [
            ScoredSpan(i, int(starts[i]), span.start + 1, span.scored, span.top)
            for i, span in enumerate(spans, count)
            if span.scored is not None
        ]
        drawn_lora = None
        if (self._adapts_head or lora.token_rows is not None) and len(drawn):
            draws_all = not spans and sizes.drawn == sizes.tokens
            drawn_lora = lora if draws_all else tiled(subset(lora, drawn_at), sizes.drawn, padded=self.pads)
        arrays = [
            ids, positions, kv_slots,
            *(_filled(array, sizes.decodes) for array in (np.ones(count), *decoding)),
            _filled(starts[chunks], sizes.chunks), _filled(counts, sizes.chunks), _filled(behind, sizes.chunks),
            _filled(table.pages[chunk_rows, : sizes.pages], sizes.chunks),
            _filled(starts[fresh], sizes.fresh), offsets,
            _filled(drawn_at, sizes.drawn), columns, _filled(starts[pooled] + lengths[pooled] - 1, sizes.pooled),
            *(array for tiles in all_tiles(lora, drawn_lora) for array in tiles.arrays),
        ]  # fmt: skip
        buffer = torch.empty(sum(array.size for array in arrays), dtype=torch.int32, pin_memory=self._pinned)
        np.concatenate([array.reshape(-1) for array in arrays], out=buffer.numpy(), casting="unsafe")
        features = features_of(columns)
        return PagedLayout(
            sizes, drawn.tolist(), pooled, pooled_heads, rounded(features) if self.pads else features, lora, drawn_lora,
            buffer, (*lengths[fresh].tolist(), *(0,) * (sizes.fresh - len(fresh))), scored,
            [array.shape for array in arrays],
        )  # fmt: skip

    def _columns(
        self, drawn: NDArray[np.int64], decodes: NDArray[np.int32], place: NDArray[np.int32],
        spans: Sequence[TokenSpan], count: int, size: int,
    ) -> NDArray[np.int32]:  # fmt: skip
        """Return the sampling values of the drawn tokens and of fillers, int32 [S, columns]."""
        rows = np.full(size, self._table.filler, dtype=np.int64)
        positions = np.zeros(size, dtype=np.int32)
        all_rows = np.concatenate((decodes, [self._table.filler if span.row is None else span.row for span in spans]))
        after = np.concatenate((place + 1, [span.start + len(span.ids) for span in spans]))
        rows[: len(drawn)] = all_rows[drawn]
        positions[: len(drawn)] = after[drawn]
        columns = self._table.sampling[rows]
        columns[:, Column.POSITION] = positions
        assert columns.shape == (size, ROW_WIDTH)
        return columns

    def _sizes(
        self, tokens: int, decodes: NDArray[np.int32], lengths: NDArray[np.int64], chunks: list[int],
        fresh: list[int], drawn: int, pooled: int, spans: Sequence[TokenSpan], count: int,
    ) -> LayoutSizes:  # fmt: skip
        longest = int(self._table.lengths[decodes].max()) if count else 0
        longest = max((longest, *(spans[i - count].start + int(lengths[i]) for i in chunks)))
        pages = pages_of(longest)
        longest_fresh = max((int(lengths[i]) for i in fresh), default=0)
        if not self.pads:
            return LayoutSizes(tokens, count, len(chunks), len(fresh), longest_fresh, pages, drawn, pooled)
        most = self._table.pages.shape[1]
        if not spans:
            rows = rounded_rows(count)
            return LayoutSizes(rows, rows, 0, 0, 0, rounded_pages(rows, pages, most), rows, 0)
        padded = rounded_step(tokens, self._max_tokens)
        padded_decodes = decodes_beside_prompts(count, padded) if count or chunks else 0
        padded_chunks = max(_few(padded)[0], power_of_four(len(chunks))) if chunks else 0
        most_drawn = max(_few(padded)[0], power_of_four(self._table.filler))  # one a row, which may have two chunks
        padded_fresh = power_of_four(len(fresh)) if fresh else 0
        return LayoutSizes(
            padded, padded_decodes, padded_chunks, padded_fresh, power_of_two(longest_fresh) if fresh else 0, most,
            padded_decodes + min(padded_chunks, most_drawn) + (padded_fresh if not chunks else 0) if drawn else 0,
            max(_LEAST_POOLED if chunks else 0, power_of_four(pooled) if pooled else 0),
        )  # fmt: skip


def decodes_beside_prompts(count: int, tokens: int) -> int:
    """Round the decodes of a step with prompts up. More tokens hide more fillers."""
    return next((size for size in _few(tokens) if count <= size), power_of_two(count))


def _few(tokens: int) -> tuple[int, int]:
    return (16, 64) if tokens <= SHORT_STEP else (64, 256)


def _filled(values: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """Append zeros up to `size` rows."""
    if len(values) == size:
        return values
    out = np.zeros((size, *values.shape[1:]), dtype=np.int32)
    out[: len(values)] = values
    return out
