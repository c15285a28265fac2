"""Logits with LoRA against float64: with torch on the CPU, with Triton interpreted or on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import Backend, plan
from ranklet.kernels.logits import logits, widened_bytes
from ranklet.kernels.merged import Merged
from ranklet.kernels.row_subset import subset
from tests.kernels import oracle
from tests.kernels.adapters import NAN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, VOCAB = 40, 300
ADAPTERS = {0: (3,), 1: (16,), 2: (0,)}  # the adapter in slot 2 leaves the head alone
LENGTHS, SLOTS = [3, 40, 5, 2, 1], [1, 0, None, 2, 1]
BACKENDS: list[Backend] = [native, csgmv, Merged()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)
def test_the_logits_of_a_row_subset_are_those_of_each_rows_adapter(backend: Backend, dtype: torch.dtype) -> None:
    order, batch = plan(LENGTHS, SLOTS)
    rows = np.array([0, 5, 39, 40, 41, 43, 44, 46, 49, 50])
    owners = [SLOTS[i] for i in order for _ in range(LENGTHS[i])]
    adapters = oracle.random_adapters(ADAPTERS, WIDE, (VOCAB,), dtype=dtype)
    stack = oracle.linear_stack(adapters, 3, 16, WIDE, (VOCAB,), stale=NAN, device=DEVICE)
    x = torch.randn(len(rows), WIDE).to(dtype)
    weight = (torch.randn(VOCAB, WIDE) * WIDE**-0.5).to(dtype)
    lora = subset(replace(batch, implementation=backend), rows).with_tiles(torch.device(DEVICE))
    found = logits(x.to(DEVICE), weight.to(DEVICE), stack, lora)
    assert found.dtype == torch.float32
    wanted = oracle.linear(x, weight, None, [owners[row] for row in rows], adapters)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # the product A x is rounded to 16 bits
    assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=tolerance)


def test_without_adapters_16_bit_weights_give_float32_logits() -> None:
    """Logits of 16 bits would differ by up to 0.03 here."""
    x, weight = torch.randn(4, 256).bfloat16(), torch.randn(VOCAB, 256).bfloat16()
    found = logits(x.float().to(DEVICE), weight.to(DEVICE)).cpu()
    assert_close(found.double(), x.double() @ weight.double().t(), rtol=0, atol=1e-4)


def test_a_batch_of_other_rows_is_refused() -> None:
    """With the batch of all rows, the rows of a head would silently get the wrong adapter."""
    adapters = oracle.random_adapters(ADAPTERS, WIDE, (VOCAB,))
    stack = oracle.linear_stack(adapters, 3, 16, WIDE, (VOCAB,), stale=NAN)
    batch = replace(plan(LENGTHS, SLOTS)[1], implementation=csgmv)
    with pytest.raises(ValueError, match="rows: expected 51"):
        logits(torch.zeros(5, WIDE), torch.zeros(VOCAB, WIDE), stack, batch)
    with pytest.raises(ValueError, match="tiles"):
        logits(torch.zeros(51, WIDE), torch.zeros(VOCAB, WIDE), stack, batch)


@pytest.mark.parametrize("more", [0, 7, 256])
def test_the_copy_for_more_tokens_takes_the_memory_that_is_reserved(more: int) -> None:
    batch = replace(plan([3, 2], [0, 1])[1], implementation=native, more_ids=more)
    x, weight = torch.randn(5, WIDE), torch.randn(VOCAB, WIDE)
    with_copy, without = logits(x, weight, None, batch), logits(x, weight, None, replace(batch, more_ids=0))
    copy_bytes = with_copy.untyped_storage().nbytes() if with_copy.shape != without.shape else 0
    assert copy_bytes == widened_bytes(5, VOCAB, more)
