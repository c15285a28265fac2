"""Paged keys and values with NaN wherever attention must not read, and attention over them in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ranklet.kernels.kv_write import KvWrite
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans, PrefixGroups

FREE_PAGES = 3


@dataclass(frozen=True)
class PagedCase:
    """Spans of a packed batch, whose keys and values are in pages.

    Attributes:
        qkv: [T, (Q + 2 G) * D]; the columns of keys and values are NaN, and so are the rows of no span.
        keys, values: [length, G, D] of each span.
    """

    qkv: Tensor
    spans: PagedSpans
    pages: LayerPages
    heads: tuple[int, int]
    keys: list[Tensor]
    values: list[Tensor]

    def to(self, device: torch.device) -> "PagedCase":
        groups = self.spans.groups
        spans = PagedSpans(
            self.spans.rows.to(device), self.spans.counts.to(device), self.spans.lengths.to(device),
            self.spans.table.to(device), self.spans.longest_query,
            groups and PrefixGroups(*(array.to(device) for array in groups)),
        )  # fmt: skip
        pages = LayerPages(self.pages.keys.to(device), self.pages.values.to(device))
        return PagedCase(self.qkv.to(device), spans, pages, self.heads, self.keys, self.values)

    def empty_out(self) -> Tensor:
        width = self.heads[0] * self.pages.keys.shape[3]
        return torch.full((len(self.qkv), width), float("nan"), dtype=self.qkv.dtype, device=self.qkv.device)


def make_case(
    counts: Sequence[int], lengths: Sequence[int], heads: tuple[int, int], width: int,
    dtype: torch.dtype = torch.float32, *, spare_pages: int = 1, gap: int = 1, shared: Sequence[tuple[int, int]] = (),
) -> PagedCase:  # fmt: skip
    """Make a case whose spans are packed in reverse order, with `gap` unrelated tokens before each.

    Each table is `spare_pages` wider than the longest span needs. Its entries behind a span point to other pages, as
    those of an earlier sequence would.

    Args:
        shared: spans and common pages of each group, from the first span on. Spans behind them are alone.
    """
    (queries, key_heads), spans = heads, len(counts)
    needed = [-(-length // PAGE_TOKENS) for length in lengths]
    total = sum(needed) + FREE_PAGES
    shuffled = torch.randperm(total).tolist()
    table = torch.randint(total, (spans, max(needed) + spare_pages), dtype=torch.int32)
    keys = torch.full((total, key_heads, PAGE_TOKENS, width), float("nan"), dtype=dtype)
    pages = LayerPages(keys, keys.clone())
    contents: tuple[list[Tensor], list[Tensor]] = ([], [])
    groups = make_groups(spans, shared)
    for span, length in enumerate(lengths):
        first, common = int(groups.firsts[span]), int(groups.shared[span]) if groups.firsts[span] < span else 0
        taken = table[first, : common // PAGE_TOKENS].tolist()
        own = taken + [shuffled.pop() for _ in range(needed[span] - len(taken))]
        table[span, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for side, parts in zip(pages, contents, strict=True):
            part = torch.randn(length, key_heads, width).to(dtype)
            part[:common] = parts[first][:common] if common else 0
            for position in range(common, length):
                side[own[position // PAGE_TOKENS], :, position % PAGE_TOKENS] = part[position]
            parts.append(part)
    rows, row = [0] * spans, 0
    for span in reversed(range(spans)):
        row += gap
        rows[span] = row
        row += counts[span]
    qkv = torch.full((row + gap, (queries + 2 * key_heads) * width), float("nan"), dtype=dtype)
    for start, count in zip(rows, counts, strict=True):
        qkv[start : start + count, : queries * width] = torch.randn(count, queries * width).to(dtype)
    starts, sizes, ends = (torch.tensor(part, dtype=torch.int32) for part in (rows, list(counts), list(lengths)))
    placed = PagedSpans(starts, sizes, ends, table, max(counts), groups if shared else None)
    return PagedCase(qkv, placed, pages, heads, *contents)


def make_groups(spans: int, shared: Sequence[tuple[int, int]]) -> PrefixGroups:
    """Return groups of consecutive spans; see `make_case`."""
    groups = PrefixGroups(torch.zeros(spans), torch.arange(spans), torch.ones(spans))
    first = 0
    for members, common in shared:
        own = slice(first, first + members)
        groups.shared[own], groups.firsts[own], groups.members[own] = common * PAGE_TOKENS, first, members
        first += members
    return PrefixGroups(*(array.int() for array in groups))


def attend64(case: PagedCase, window: int | None) -> Tensor:
    """Return attention in float64, [T, Q * D], with NaN in the rows of no span."""
    queries, key_heads = case.heads
    width = case.pages.keys.shape[3]
    out = torch.full((len(case.qkv), queries, width), float("nan"), dtype=torch.float64)
    sizes = (case.spans.rows.tolist(), case.spans.counts.tolist(), case.spans.lengths.tolist())
    for row, count, length, k, v in zip(*sizes, case.keys, case.values, strict=True):
        if not count:
            continue
        k64, v64 = (part.double().repeat_interleave(queries // key_heads, 1).transpose(0, 1) for part in (k, v))
        q64 = case.qkv[row : row + count, : queries * width].double().view(count, queries, width).transpose(0, 1)
        position = torch.arange(length - count, length)[:, None]
        seen = (torch.arange(length) <= position) & (torch.arange(length) > position - (window or length))
        scores = (q64 @ k64.transpose(1, 2)) / width**0.5
        out[row : row + count] = (scores.masked_fill(~seen, float("-inf")).softmax(2) @ v64).transpose(0, 1)
    return out.flatten(1)


def make_kv_write(tokens: int, key_heads: int, width: int, dtype: torch.dtype) -> KvWrite:
    """Return pages of NaN and a slot of its own for each token, except for about a third of them."""
    count = tokens // PAGE_TOKENS + 2
    slots = torch.randperm(count * PAGE_TOKENS)[:tokens].to(torch.int32)
    slots[torch.rand(tokens) < 0.3] = -1
    keys = torch.full((count, key_heads, PAGE_TOKENS, width), float("nan"), dtype=dtype)
    return KvWrite(slots, LayerPages(keys, keys.clone()))


def check_stored(qkv: Tensor, kv: KvWrite | None) -> None:
    """Check that the pages hold the keys and values of `qkv` in the slots and NaN elsewhere, then clear them."""
    assert kv is not None
    _, key_heads, page, width = kv.pages.keys.shape
    kept = (kv.slots >= 0).cpu()
    slots = kv.slots.cpu()[kept].long()
    first = qkv.shape[1] - 2 * key_heads * width
    for index, side in enumerate(kv.pages):
        columns = slice(first + index * key_heads * width, first + (index + 1) * key_heads * width)
        expected = torch.full(side.shape, float("nan"), dtype=side.dtype)
        expected[slots // page, :, slots % page] = qkv.cpu()[kept][:, columns].view(-1, key_heads, width)
        assert torch.equal(side.cpu().nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
        side.fill_(float("nan"))
