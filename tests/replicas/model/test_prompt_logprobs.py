"""Prompt logprobs in chunks equal those of all rows at once, with each row's adapter."""

from dataclasses import replace

import pytest
import torch

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import Backend, plan
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.prompt_logprobs import prompt_logprobs
from ranklet.replicas.model.sampler import TokenLogprobs
from tests.kernels import oracle
from tests.kernels.adapters import NAN

WIDE, VOCAB, LENGTHS, SLOTS = 40, 130, [3, 40, 5, 2, 1], [1, 0, None, 2, 1]
ROWS = sum(LENGTHS)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """Rows of several adapters, and their logits in float64."""

    def __init__(self) -> None:
        order, batch = plan(LENGTHS, SLOTS)
        self.batch = batch.with_tiles(DEVICE)
        adapters = oracle.random_adapters({0: (3,), 1: (16,), 2: (0,)}, WIDE, (VOCAB,))
        self.stack = oracle.linear_stack(adapters, 3, 16, WIDE, (VOCAB,), stale=NAN, device=DEVICE.type)
        rows, weight = torch.randn(ROWS, WIDE), torch.randn(VOCAB, WIDE) * WIDE**-0.5
        owners = [SLOTS[i] for i in order for _ in range(LENGTHS[i])]
        self.logits = oracle.linear(rows, weight, None, owners, adapters)
        self.targets = torch.randint(VOCAB, (ROWS,), dtype=torch.int32)
        self.rows, self.head = rows.to(DEVICE), LmHead(weight.to(DEVICE), ties=False)

    def run(self, backend: Backend, chunk_rows: int, top: int) -> TokenLogprobs:
        lora = replace(self.batch, implementation=backend)
        found = prompt_logprobs(
            self.head, self.rows, self.targets.to(DEVICE), top, self.stack, lora, chunk_rows=chunk_rows
        )
        return TokenLogprobs(found.logprobs.cpu(), *(None if part is None else part.cpu() for part in found[1:]))


@pytest.mark.parametrize("backend", [native, csgmv], ids=lambda backend: backend.NAME)
@pytest.mark.parametrize("chunk_rows", [7, 41, ROWS, 1024])
def test_chunks_of_any_size_give_each_rows_own_logprobs(chunk_rows: int, backend: Backend) -> None:
    case = Case()
    found = case.run(backend, chunk_rows, top=5)
    wanted = case.logits.log_softmax(1)
    own = wanted.gather(1, case.targets[:, None].long())[:, 0]
    torch.testing.assert_close(found.logprobs.double(), own, rtol=0, atol=1e-5)
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    values, ids = wanted.topk(5)
    torch.testing.assert_close(found.top_logprobs[:, :5].double(), values, rtol=0, atol=1e-5)
    assert torch.equal(found.top_ids[:, :5].long(), ids)


def test_without_top_only_the_targets_logprobs_are_made() -> None:
    case = Case()
    found = case.run(native, 10, top=0)
    assert found.logprobs.shape == (ROWS,)
    assert found.top_ids is found.top_logprobs is None


def test_no_chunk_has_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = Case(), []
    compute = LmHead.logits

    def logits(*args: object) -> torch.Tensor:
        seen.append(compute(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(LmHead, "logits", logits)
    case.run(native, 20, top=0)
    assert [len(each) for each in seen] == [20, 20, 11]


def test_no_rows_give_no_logprobs() -> None:
    head = LmHead(torch.randn(VOCAB, WIDE), ties=False)
    found = prompt_logprobs(head, torch.zeros(0, WIDE), torch.zeros(0, dtype=torch.int32), 0)
    assert found.logprobs.shape == (0,)


def test_a_batch_of_other_rows_is_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="expected 51, the rows of the batch, got 50"):
        prompt_logprobs(case.head, case.rows[1:], case.targets[1:], 0, case.stack, case.batch)
