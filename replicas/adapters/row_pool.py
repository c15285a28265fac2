"""Device memory for the rows of tokens that adapters have of their own, shared by all slots."""

from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from ranklet.kernels.token_rows import PAGE, TokenRows, pages_for
from ranklet.replicas.adapters.packed_rows import PackedRows
from ranklet.replicas.adapters.pinned_memory import staged
from ranklet.replicas.errors import Unavailable


class RowsTaken(Unavailable):
    """The rows of other adapters, which are in use, leave too few for those of this one."""

    def __init__(self, needed: int, available: int, capacity: int) -> None:
        super().__init__(
            f"rows of tokens: this adapter has {needed}, {available} of the {capacity} of this replica "
            "(engine.token_rows) are free beside those of adapters in use. Try again later"
        )


class RowPool:
    """Gives pages of rows to slots. The memory is allocated when the first adapter needs some.

    Loads run on several threads, each with a slot of its own.

    Args:
        capacity: number of rows, rounded up to whole pages.
        width: numbers of a row.
    """

    def __init__(self, slots: int, capacity: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._slots = slots
        self._pages = pages_for(capacity)
        self._width = width
        self._device = device
        self._dtype = dtype
        self._lock = Lock()
        self._free = list(range(self._pages))
        self._held: dict[int, list[int]] = {}  # pages by slot
        self._table: TokenRows | None = None

    @property
    def table(self) -> TokenRows:
        """Return the rows on the device."""
        with self._lock:
            if self._table is None:
                self._table = self._allocate()
            return self._table

    @property
    def nbytes(self) -> int:
        """Return the memory that is allocated."""
        table = self._table
        return 0 if table is None else sum(each.nbytes for each in (table.rows, table.ids, table.slots))

    @property
    def capacity(self) -> int:
        """Return the number of rows."""
        return self._pages * PAGE

    @property
    def most_bytes(self) -> int:
        """Return the memory that is allocated once an adapter needs it."""
        row = self._width * self._dtype.itemsize + 4
        return self.capacity * row + 2 * 4 * self._slots * (self._pages + 1)

    def _allocate(self) -> TokenRows:
        with torch.inference_mode(False):
            return TokenRows(
                torch.zeros((self.capacity, self._width), dtype=self._dtype, device=self._device),
                self._integers(self.capacity), self._integers(self._slots, 2, 1 + self._pages),
                [[0] * self._slots for _ in range(2)],
            )  # fmt: skip

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def drop_memory(self) -> None:
        """Free the memory, which no slot uses."""
        self._table = None

    @property
    def free_rows(self) -> int:
        return len(self._free) * PAGE

    def rows_of(self, slot: int) -> int:
        """Return the number of rows that a slot takes."""
        return len(self._held.get(slot, ())) * PAGE

    def free(self, slot: int) -> None:
        """Give back the pages of a slot that no batch uses."""
        with self._lock:
            self._free += self._held.pop(slot, [])

    def claim(self, slot: int, rows: int) -> None:
        """Give a slot that no batch uses pages for this number of rows, in place of those that it has.

        Raises:
            RowsTaken: too few pages are free. The slot has none then.
        """
        self._claim(slot, pages_for(rows))

    def _claim(self, slot: int, pages: int) -> list[int]:
        """Return the pages of a slot, which are as many as `pages` then."""
        with self._lock:
            held = self._held.get(slot, [])
            if len(held) != pages:
                self._free += self._held.pop(slot, [])
                if pages > len(self._free):
                    raise RowsTaken(pages * PAGE, self.free_rows, self.capacity)
                held = self._held[slot] = [self._free.pop() for _ in range(pages)]
            return held

    def write(self, slot: int, rows: PackedRows) -> None:
        """Launch copies that replace the rows of a slot that no batch uses, on the current stream.

        Raises:
            RowsTaken: as `claim`, unless it gave the slot pages for these rows.
        """
        pages = self._claim(slot, rows.pages)
        if not rows and (self._table is None or not any(held[slot] for held in self._table.held)):
            return
        table = self.table
        self._describe(table, slot, rows, pages)
        if rows:
            moved, index = self._moved(rows.block), self._moved(torch.tensor(pages))
            for kept, own in zip((table.rows, table.ids), rows.split(moved), strict=True):
                kept.view(self._pages, -1).index_copy_(0, index, own)

    def _describe(self, table: TokenRows, slot: int, rows: PackedRows, pages: Sequence[int]) -> None:
        """Set the number of a slot's rows by use, and their pages."""
        numbers = np.zeros((2, 1 + self._pages), dtype=np.int32)
        for use, (first, count) in enumerate(rows.uses):
            own = pages[first : first + pages_for(count)]
            numbers[use, 0], numbers[use, 1 : 1 + len(own)] = count, own
            table.held[use][slot] = count
        table.slots[slot].copy_(staged(torch.from_numpy(numbers), self._device), non_blocking=True)

    def _moved(self, tensor: Tensor) -> Tensor:
        return staged(tensor, self._device).to(self._device, non_blocking=True)
