"""The table of rows takes the memory that pages of keys and values leave free for it."""

import pytest
import torch

from ranklet.kernels.token_rows import PAGE
from ranklet.replicas.adapters.adapter import AdapterRows, OwnRows
from ranklet.replicas.adapters.row_pool import RowPool, RowsTaken

CPU, WIDTH = torch.device("cpu"), 24


@pytest.mark.parametrize(("slots", "capacity"), [(1, 0), (3, 1), (8, 4 * PAGE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_is_known_before_it_is_taken(slots: int, capacity: int, dtype: torch.dtype) -> None:
    pool = RowPool(slots, capacity, WIDTH, CPU, dtype)
    announced = pool.most_bytes
    assert pool.nbytes == 0
    assert pool.table.rows.shape == (pool.capacity, WIDTH)
    assert pool.nbytes == pool.most_bytes == announced


def rows(count: int) -> AdapterRows:
    return AdapterRows(OwnRows(torch.arange(count, dtype=torch.int32), torch.randn(count, WIDTH)))


def test_a_slot_takes_whole_pages_and_gives_them_back() -> None:
    pool = RowPool(2, 3 * PAGE, WIDTH, CPU, torch.float32)
    pool.write(0, rows(PAGE + 1))
    assert (pool.rows_of(0), pool.free_rows) == (2 * PAGE, PAGE)
    with pytest.raises(RowsTaken, match=f"has {2 * PAGE}, {PAGE} of the {3 * PAGE} of this replica"):
        pool.claim(1, rows(PAGE + 1))
    assert pool.rows_of(1) == 0
    pool.write(0, rows(3 * PAGE))
    pool.write(0, rows(1))
    pool.claim(1, rows(2 * PAGE))
    assert pool.free_rows == 0
    pool.free(0)
    pool.free(1)
    assert pool.free_rows == pool.capacity == 3 * PAGE
