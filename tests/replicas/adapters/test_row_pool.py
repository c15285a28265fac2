"""The table of rows takes the memory that pages of keys and values leave free for it."""

import pytest
import torch

from ranklet.kernels.token_rows import EMBEDDING_ROWS, HEAD_ROWS, PAGE
from ranklet.replicas.adapters.adapter import AdapterRows, OwnRows
from ranklet.replicas.adapters.packed_rows import PackedRows, pack_rows
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


def own(*ids: int) -> OwnRows:
    return OwnRows(torch.tensor(ids, dtype=torch.int32), torch.randn(len(ids), WIDTH))


def packed(embedding: OwnRows | None, head: OwnRows | None = None) -> PackedRows:
    return pack_rows(AdapterRows(embedding, head), torch.float32)


def rows(count: int) -> PackedRows:
    return packed(own(*range(count)))


def test_a_slot_takes_whole_pages_and_gives_them_back() -> None:
    pool = RowPool(2, 3 * PAGE, WIDTH, CPU, torch.float32)
    pool.write(0, rows(PAGE + 1))
    assert (pool.rows_of(0), pool.free_rows) == (2 * PAGE, PAGE)
    with pytest.raises(RowsTaken, match=f"has {2 * PAGE}, {PAGE} of the {3 * PAGE} of this replica"):
        pool.claim(1, PAGE + 1)
    assert pool.rows_of(1) == 0
    pool.write(0, rows(3 * PAGE))
    pool.write(0, rows(1))
    pool.claim(1, 2 * PAGE)
    assert pool.free_rows == 0
    pool.free(0)
    pool.free(1)
    assert pool.free_rows == pool.capacity == 3 * PAGE


def test_a_slot_has_the_rows_of_its_last_adapter_for_each_use() -> None:
    """Embedding and head share rows or have some of their own, in pages of any order."""
    pool = RowPool(3, 8 * PAGE, WIDTH, CPU, torch.float32)
    short, long, other = own(3, 7), own(*range(5, 5 + 2 * PAGE + 1)), own(1)
    pool.write(2, packed(other))
    pool.write(1, packed(long))
    pool.free(2)
    kinds = [(short, long), (long, long), (None, short), (long, None), (None, None), (other, short)]
    for embedding, head in kinds:
        pool.write(0, packed(embedding, head))
        for use, wanted in ((EMBEDDING_ROWS, embedding), (HEAD_ROWS, head)):
            places = pool.table.places(use, 0)
            count = 0 if wanted is None else len(wanted.ids)
            assert pool.table.slots[0, use, 0] == pool.table.held[use][0] == len(places) == count
            if wanted is not None:
                assert torch.equal(pool.table.ids[places], wanted.ids)
                assert torch.equal(pool.table.rows[places], wanted.rows)
        others = pool.table.places(EMBEDDING_ROWS, 1)
        assert torch.equal(pool.table.rows[others], long.rows), "another slot's rows are unchanged"
