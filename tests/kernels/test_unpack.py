"""Writing of slots, against torch's copies: matrices smaller than their destination, transposed, and missing."""

import pytest
import torch

from ranklet.kernels.unpack import Destination, table, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
# rows and columns of the destination, rows and columns of the matrix, and whether it is stored transposed
MATRICES = [
    ((16, 40), (16, 40), False), ((16, 3000), (3, 3000), False), ((500, 16), (500, 5), False),
    ((16, 24), (0, 0), False), ((700, 32), (700, 8), True), ((16, 1), (1, 1), False), ((9, 16), (9, 16), True),
]  # fmt: skip


def test_a_destination_without_a_matrix_is_zeroed_and_a_huge_slot_refused() -> None:
    slot = torch.full((64,), NAN, device=DEVICE)
    unpack(torch.zeros(1, device=DEVICE), slot, table([Destination(0, 4, 16)], slot.device))
    assert torch.equal(slot.cpu(), torch.zeros(64))
    with pytest.raises(ValueError, match=r"2\^31"):
        table([Destination(1 << 30, 1 << 20, 1 << 10)], slot.device)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "float16", "bfloat16"],
)
def test_every_destination_is_written(dtype: torch.dtype) -> None:
    destinations, parts, wanted, at, source = [], [], [], 0, 0
    for (rows, columns), (its_rows, its_columns), transposed in MATRICES:
        matrix = torch.randn(its_rows, its_columns).to(dtype)
        strides = (1, its_rows) if transposed else (its_columns, 1)
        destinations.append(Destination(at, rows, columns, source, its_rows, its_columns, *strides))
        parts.append((matrix.t() if transposed else matrix).flatten())
        expected = torch.zeros(rows, columns, dtype=dtype)
        expected[:its_rows, :its_columns] = matrix
        wanted.append(expected.flatten())
        at, source = at + rows * columns, source + its_rows * its_columns
    slot = torch.full((at + 32,), NAN, dtype=dtype, device=DEVICE)
    unpack(torch.cat(parts).to(DEVICE), slot, table(destinations, slot.device))
    assert torch.equal(slot[:at].cpu(), torch.cat(wanted))
    assert slot[at:].isnan().all(), "nothing is written behind the last destination"
