"""The rows of tokens of an adapter, laid out for one copy to the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ranklet.kernels.token_rows import PAGE, pages_for
from ranklet.replicas.adapters.adapter import AdapterRows, OwnRows
from ranklet.replicas.adapters.pinned_memory import Allocate, pageable

_ID_BYTES = torch.int32.itemsize
_FEW_BYTES = 1 << 20  # pinning them takes a GPU's driver longer than all that rows add to a load otherwise
_NO_BLOCK = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Whole pages of rows and, behind them, the token of each row, in one block.

    Attributes:
        block: uint8 [bytes]. If it is large and the pool on a GPU, it is in pinned memory; a small one is copied into
            pinned memory at each load.
        dtype: of the rows.
        pages: number of pages.
        uses: the first page and the number of rows of each use (`EMBEDDING_ROWS`, `HEAD_ROWS`).
        end_id: the number behind the highest token of the embedding's rows; 0 if it has none.
    """

    block: Tensor = _NO_BLOCK
    dtype: torch.dtype = torch.float32
    pages: int = 0
    uses: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    end_id: int = 0

    def __bool__(self) -> bool:
        return self.pages > 0

    def split(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [pages, PAGE * hidden] and tokens [pages, PAGE] of `block`, or of a copy on a device."""
        ids_bytes = self.pages * PAGE * _ID_BYTES
        rows, ids = block.split((len(block) - ids_bytes, ids_bytes))
        return rows.view(self.dtype).view(self.pages, -1), ids.view(torch.int32).view(self.pages, PAGE)

    def vocab(self, base: int) -> int:
        """Return the number of token ids of the adapter, given that of the base model."""
        return max(base, self.end_id)

    @property
    def taken(self) -> int:
        """Return the number of rows in the pages that the adapter needs."""
        return self.pages * PAGE

    @property
    def nbytes(self) -> int:
        return self.block.nbytes


def pack_rows(rows: AdapterRows, dtype: torch.dtype, allocate: Allocate = pageable) -> PackedRows:
    """Pack an adapter's rows for a pool of this dtype."""
    if not rows:
        return PackedRows()
    first_pages, pages = dict[int, int](), 0
    for own in rows.distinct:
        first_pages[id(own)] = pages
        pages += pages_for(len(own.ids))
    hidden = rows.distinct[0].rows.shape[1]
    size = pages * PAGE * (hidden * dtype.itemsize + _ID_BYTES)
    block = (pageable if size < _FEW_BYTES else allocate)(size, torch.uint8)
    uses = tuple((0, 0) if own is None else (first_pages[id(own)], len(own.ids)) for own in (rows.embedding, rows.head))
    packed = PackedRows(block, dtype, pages, uses, rows.vocab(0))
    for own in rows.distinct:
        _write(own, first_pages[id(own)] * PAGE, *packed.split(block))
    return packed


def _write(own: OwnRows, start: int, rows: Tensor, ids: Tensor) -> None:
    stop = start + len(own.ids)
    rows.view(-1, own.rows.shape[1])[start:stop].copy_(own.rows)
    ids.view(-1)[start:stop].copy_(own.ids)


def rows_taken_by(rows: AdapterRows) -> int:
    """Return the number of rows in the pages that an adapter needs."""
    return PAGE * sum(pages_for(len(own.ids)) for own in rows.distinct)
