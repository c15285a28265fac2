"""Device memory for the rows of tokens that adapters have of their own, shared by all slots."""

import math
from threading import Lock

import torch
from torch import Tensor

from ranklet.kernels.token_rows import EMBEDDING_ROWS, HEAD_ROWS, PAGE, TokenRows
from ranklet.replicas.adapters.adapter import AdapterRows, OwnRows
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
        self._pages = -(-capacity // PAGE)
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
        return 0 if table is None else sum(each.nbytes for each in (table.rows, table.ids, table.pages, table.counts))

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
                self._integers(self.capacity), self._integers(2, self._slots, self._pages),
                self._integers(2, self._slots), [[0] * self._slots for _ in range(2)],
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

    def claim(self, slot: int, rows: AdapterRows) -> None:
        """Give a slot that no batch uses pages for these rows, in place of those that it has.

        Raises:
            RowsTaken: too few pages are free. The slot has none then.
        """
        needed = rows_taken_by(rows)
        with self._lock:
            self._free += self._held.pop(slot, [])
            if needed > self.free_rows:
                raise RowsTaken(needed, self.free_rows, self.capacity)
            self._held[slot] = [self._free.pop() for _ in range(needed // PAGE)]

    def write(self, slot: int, rows: AdapterRows) -> None:
        """Replace the rows of a slot that no batch uses, on the current stream.

        Raises:
            RowsTaken: as `claim`, unless it gave the slot pages for these rows.
        """
        self.claim(slot, rows)
        if not rows and (self._table is None or not any(held[slot] for held in self._table.held)):
            return
        table, given = self.table, self._places(slot, rows)
        for use, own in ((EMBEDDING_ROWS, rows.embedding), (HEAD_ROWS, rows.head)):
            count = 0 if own is None else len(own.ids)
            if own is not None:
                pages = given[id(own)]
                table.pages[use, slot, : len(pages)] = pages.to(self._device)
            table.held[use][slot] = count
            table.counts[use, slot] = count
        for own in rows.distinct:
            pages = given[id(own)]
            places = (pages[:, None] * PAGE + torch.arange(PAGE)).view(-1)[: len(own.ids)].to(self._device)
            table.rows.index_copy_(0, places, own.rows.to(self._device, self._dtype))
            table.ids.index_copy_(0, places, own.ids.to(self._device))

    def _places(self, slot: int, rows: AdapterRows) -> dict[int, Tensor]:
        """Return the pages of a slot's rows by the identity of `OwnRows`."""
        with self._lock:
            held = torch.tensor(self._held[slot], dtype=torch.int64)
        parts = held.split([_pages_of(own) for own in rows.distinct])
        return {id(own): part for own, part in zip(rows.distinct, parts, strict=True)}


def rows_taken_by(rows: AdapterRows) -> int:
    """Return the number of rows in the pages that an adapter needs."""
    return PAGE * sum(map(_pages_of, rows.distinct))


def _pages_of(own: OwnRows) -> int:
    return math.ceil(len(own.ids) / PAGE)
