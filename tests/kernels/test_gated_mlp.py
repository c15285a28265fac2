"""Gate, up and activation in one product, against float64: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch
from torch.nn import functional

from ranklet.kernels import gated_mlp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "wide", "width"), [(1, 64, 128), (128, 128, 256), (300, 192, 128), (129, 64, 384)])
def test_gated_is_the_activation_of_the_product(rows: int, wide: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, wide).to(dtype), (torch.randn(2 * width, wide) * wide**-0.5).to(dtype)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    wanted = functional.silu(gate) * up
    found = gated_mlp.gated(x.to(DEVICE), weight.to(DEVICE)).cpu().double()
    error = 2e-3 if dtype == torch.bfloat16 else 3e-4  # one rounding
    assert (found - wanted).norm() <= error * wanted.norm()


@pytest.mark.gpu
def test_gated_supports_only_many_rows_of_16_bits_and_whole_blocks() -> None:
    hopper = torch.cuda.get_device_capability()[0] >= 9
    for rows, wide, width, dtype, expected in (
        (4096, 1024, 3072, torch.bfloat16, hopper),
        (1024, 1024, 3072, torch.bfloat16, False),
        (4096, 1024, 3072, torch.float32, False),
        (4096, 1000, 3072, torch.bfloat16, False),
        (4096, 1024, 3000, torch.bfloat16, False),
    ):
        x = torch.empty(rows, wide, dtype=dtype, device="cuda")
        assert gated_mlp.can_gate(x, torch.empty(2 * width, wide, dtype=dtype, device="cuda")) == expected
