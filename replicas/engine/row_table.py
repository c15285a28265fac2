"""A table on the host with one row for each sequence that has pages, so that a step gathers its arrays with numpy.

Letters: R rows, P pages a row.
"""

import numpy as np
from numpy.typing import NDArray

from ranklet.kernels.sampling_row import ROW_WIDTH
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.model.sampling_values import filler_columns


class RowTable:
    """Rows of the sequences that have pages. Row R belongs to the fillers of padded steps.

    Attributes:
        pages: int32 [R + 1, P]; entries past a sequence's last page hold any number.
        lengths: int32 [R + 1]: tokens whose keys and values launched steps have written.
        spaces: int32 [R + 1]: tokens that fit into the sequence's pages.
        slots: int32 [R + 1]: pool slot of the adapter, -1 for the base model.
        sampling: int32 [R + 1, columns]: sampling values of the sequence.
    """

    def __init__(self, rows: int, pages: int) -> None:
        self.filler = rows
        self.pages = np.zeros((rows + 1, pages), dtype=np.int32)
        self.lengths = np.zeros(rows + 1, dtype=np.int32)
        self.spaces = np.zeros(rows + 1, dtype=np.int32)
        self.slots = np.full(rows + 1, -1, dtype=np.int32)
        self.sampling = np.zeros((rows + 1, ROW_WIDTH), dtype=np.int32)
        self.sampling[rows] = filler_columns(rows)
        self._free = list(range(rows - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self._free.append(row)

    def full(self, rows: NDArray[np.int32]) -> list[int]:
        """Return the indices of the given rows whose pages have no space for another token."""
        found: list[int] = (self.lengths[rows] == self.spaces[rows]).nonzero()[0].tolist()
        return found

    def set_pages(self, row: int, start: int, pages: list[int]) -> None:
        """Set the pages of a row from index `start` on."""
        stop = start + len(pages)
        self.pages[row, start:stop] = pages
        self.spaces[row] = stop * PAGE_TOKENS

    def page_slots(self, rows: int | NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return where keys and values go: page * PAGE_TOKENS + offset, int32 [tokens].

        Args:
            rows: of each token, or one for all.
            positions: int32 [tokens]: of each token in its sequence.
        """
        found: NDArray[np.int32] = self.pages[rows, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
        return found
