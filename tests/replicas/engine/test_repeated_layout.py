"""A step of the same decodes is packed as if it were packed anew."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import LayoutPacker, StepItems
from ranklet.replicas.engine.repeated_layout import RepeatedLayout
from ranklet.replicas.engine.row_table import RowTable
from tests.replicas.engine.given import HEAD

ROWS, STEPS = 12, 150
COMMON = 110  # common pages: more than a step of 9 decodes needs for a group


def filled_table() -> RowTable:
    """Return rows of different lengths and adapters, each with pages for its tokens. Some begin with the same pages."""
    rng = np.random.default_rng(0)
    table = RowTable(ROWS, 160)
    for row in range(ROWS):
        table.lengths[row] = rng.integers(1, 900)
        pages = -(-int(table.lengths[row]) // PAGE_TOKENS)
        table.set_pages(row, 0, rng.integers(0, 1000, pages).tolist())
    for row in (0, 2, 9):
        table.lengths[row] += COMMON * PAGE_TOKENS
        pages = -(-int(table.lengths[row]) // PAGE_TOKENS)
        table.set_pages(row, 0, [*range(2000, 2000 + COMMON), *rng.integers(0, 1000, pages - COMMON).tolist()])
    table.slots[:ROWS] = rng.integers(-1, 3, ROWS)
    table.sampling[:ROWS, 1] = np.arange(ROWS)
    return table


def advance(table: RowTable, rows: NDArray[np.int32]) -> None:
    for index in table.full(rows):
        row = int(rows[index])
        table.set_pages(row, int(table.spaces[row]) // PAGE_TOKENS, [5000 + row])
    table.lengths[rows] += 1


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("skipped", [1, 7])  # steps between two of decodes only, which have the same decodes too
def test_repeated_steps_equal_packed_ones(pads: bool, skipped: int) -> None:
    table = filled_table()
    packer = LayoutPacker(table, max_tokens=4096, pads=pads, pinned=False, adapts_head=True, group_limit=3)
    items = StepItems(np.array([7, 2, 9, 0, 4, 1, 3, 11, 5], dtype=np.int32), [], [])
    repeated: RepeatedLayout | None = None
    sizes, count = None, 0
    for step in range(STEPS):
        advance(table, items.decodes)
        if step % skipped:
            continue
        wanted = packer.pack(items, *items.lora(table))
        found = repeated.next(items) if repeated is not None else None
        if found is None:
            assert wanted.sizes != sizes
            repeated, sizes = RepeatedLayout(table, items, wanted), wanted.sizes
            continue
        count += 1
        assert torch.equal(found.buffer, wanted.buffer)
        assert found.sizes == wanted.sizes
        assert found.drawn_items == wanted.drawn_items
        decodes = found.unpack(found.buffer).decodes
        assert decodes is not None
        assert decodes.groups is not None
        assert sorted(decodes.groups.shared[:9].tolist()) == [*6 * [0], *3 * [COMMON * PAGE_TOKENS]]
    assert count


@pytest.mark.parametrize("count", [7, 8])
def test_steps_of_few_decodes_have_no_groups(count: int) -> None:
    table = filled_table()
    packer = LayoutPacker(table, max_tokens=4096, pads=False, pinned=False, adapts_head=False, group_limit=8)
    items = StepItems(np.arange(count, dtype=np.int32), [], [])
    layout = packer.pack(items, *items.lora(table))
    decodes = layout.unpack(layout.buffer).decodes
    assert decodes is not None
    assert (decodes.groups is not None) == (count == 8)


def test_other_steps_are_not_repeated() -> None:
    table = filled_table()
    packer = LayoutPacker(table, max_tokens=4096, pads=True, pinned=False, adapts_head=False, group_limit=3)
    rows = np.array([1, 2], dtype=np.int32)
    items = StepItems(rows, [], [])
    repeated = RepeatedLayout(table, items, packer.pack(items, *items.lora(table)))
    assert repeated.next(items) is not None
    assert repeated.next(StepItems(rows.copy(), [], [])) is None
    assert repeated.next(StepItems(rows, [TokenSpan(np.zeros(3, np.int32), 0, HEAD)], [None])) is None
