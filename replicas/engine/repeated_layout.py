"""Packs a step of the same decodes as the step before: only lengths, places and new pages differ."""

from dataclasses import replace

import numpy as np
import torch

from ranklet.kernels.sampling_row import Column
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.engine.paged_layout import PagedLayout, StepItems
from ranklet.replicas.engine.row_table import RowTable


class RepeatedLayout:
    """Packs the steps that follow a step of decodes only.

    Args:
        items: the items of that step.
        layout: its layout.
    """

    def __init__(self, table: RowTable, items: StepItems, layout: PagedLayout) -> None:
        self._table = table
        self._layout = layout
        self._rows = items.decodes
        self._arrays: _HostArrays | None = None

    def next(self, items: StepItems) -> PagedLayout | None:
        """Return the layout of a step; None if it must be packed anew.

        The step has the same decodes if its array of rows is the same object: see `Holders.decode_set`.
        """
        if items.decodes is not self._rows or items.spans:
            return None
        lengths = self._table.lengths[self._rows]
        if lengths.max() > self._layout.sizes.pages * PAGE_TOKENS:
            return None
        if self._arrays is None:  # many steps are not repeated
            self._arrays = _HostArrays(self._layout, len(self._rows))
        self._arrays.update(self._table)
        buffer = torch.empty_like(self._layout.buffer, pin_memory=self._layout.buffer.is_pinned())
        buffer.copy_(self._arrays.buffer)
        return replace(self._layout, buffer=buffer)


class _HostArrays:
    """A copy of a layout's arrays, which is changed from step to step."""

    def __init__(self, layout: PagedLayout, count: int) -> None:
        self.buffer = layout.buffer.clone()
        arrays = layout.unpack(self.buffer)
        assert arrays.decodes is not None
        self._at = arrays.decodes.rows[:count].numpy()
        self._rows = -1 - arrays.ids.numpy()[self._at]
        self._lengths = arrays.decodes.lengths[:count].numpy()
        self._pages = arrays.decodes.table[:count].numpy()
        self._positions, self._kv_slots = arrays.positions.numpy(), arrays.kv_slots.numpy()
        self._next_positions = arrays.columns.numpy()[:, Column.POSITION]
        self._spaces = np.zeros(count, dtype=np.int32)

    def update(self, table: RowTable) -> None:
        rows = self._rows
        lengths, spaces = table.lengths[rows], table.spaces[rows]
        grown = (spaces != self._spaces).nonzero()[0]
        if len(grown):
            self._pages[grown] = table.pages[rows[grown], : self._pages.shape[1]]
            self._spaces = spaces
        at, place = self._at, lengths - 1
        self._lengths[:] = lengths
        self._positions[at] = place
        self._kv_slots[at] = table.page_slots(rows, place)
        self._next_positions[at] = lengths
