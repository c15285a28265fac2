"""Logprobs against float64, on the CPU and by Triton."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ranklet.kernels.adjust import SamplingTables
from ranklet.kernels.logprobs import largest_logprobs, logprobs_at, target_logprobs, top_logprobs
from ranklet.kernels.sample import scan
from ranklet.kernels.sampling_row import ROW_WIDTH, TOP_LOGPROBS, Feature
from ranklet.replicas.model.sampler import logprobs_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ASKS = Feature.LOGPROB | Feature.TOP


def by_kernels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(DEVICE)
    columns = torch.full((len(logits), ROW_WIDTH), int(ASKS), dtype=torch.int32, device=DEVICE)
    scanned = scan(logits, columns, SamplingTables(), ASKS)
    ids, values = top_logprobs(logits, scanned, None)
    return target_logprobs(logits, targets.to(DEVICE), scanned).cpu(), ids.cpu(), values.cpu()


@pytest.mark.parametrize("vocab", [1, 7, 20, 21, 397, 4096, 4097, 9000])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_logprobs_agree_with_float64(vocab: int, spread: float) -> None:
    logits, targets = spread * torch.randn(3, vocab), torch.randint(vocab, (3,), dtype=torch.int32)
    expected = torch.log_softmax(logits.double(), 1)
    count = min(vocab, TOP_LOGPROBS)
    largest = expected.topk(count, dim=1)
    for own, ids, values in (by_kernels(logits, targets), (logprobs_at(logits, targets), *largest_logprobs(logits))):
        torch.testing.assert_close(own.double(), expected.gather(1, targets[:, None].long())[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[:, :count].double(), largest.values, rtol=0, atol=1e-5)
        assert torch.equal(ids[:, :count].long(), largest.indices)
        assert (ids[:, count:] == -1).all()
        assert (values[:, count:] == -torch.inf).all()


def test_ties_come_in_order_of_ids_even_if_there_are_many() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [40, 4999]] = 1.0
    logits[1] = torch.from_numpy(np.arange(5000) // 5).float()
    targets = torch.zeros(2, dtype=torch.int32)
    _, ids, _ = by_kernels(logits, targets)
    assert ids[0].tolist() == [40, 4999, *range(18)]
    assert ids[1].tolist() == [4995 - 5 * level + at for level in range(4) for at in range(5)]
    assert torch.equal(ids, largest_logprobs(logits)[0])


def test_logprobs_of_given_tokens() -> None:
    logits, targets = torch.randn(4, 50), torch.tensor([3, 0, 49, 7], dtype=torch.int32)
    found = logprobs_of(logits, targets, 0)
    assert found.top_ids is None
    assert torch.equal(found.logprobs, logprobs_of(logits, targets, 5).logprobs)
    torch.testing.assert_close(found.logprobs, torch.log_softmax(logits, 1)[range(4), targets.long()])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_stays_in_its_row() -> None:
    logits, targets = torch.randn(3, 300), torch.zeros(3, dtype=torch.int32)
    logits[1, 250] = torch.nan
    for own in (by_kernels(logits, targets)[0], logprobs_at(logits, targets)):
        assert own.isnan().tolist() == [False, True, False]


@pytest.mark.gpu
def test_large_vocabulary_on_cuda() -> None:
    logits, targets = 4 * torch.randn(64, 151_669), torch.randint(151_669, (64,), dtype=torch.int32)
    expected = torch.log_softmax(logits.double(), 1)
    own, ids, values = by_kernels(logits, targets)
    largest = expected.topk(TOP_LOGPROBS, dim=1)
    torch.testing.assert_close(own.double(), expected.gather(1, targets[:, None].long())[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), largest.values, rtol=0, atol=1e-5)
    assert torch.equal(ids.long(), largest.indices)
