"""Which backend a batch gets, and that the two calls follow it."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from ranklet.kernels import dispatch
from ranklet.kernels.batch import LoraBatch, Segment, plan
from tests.kernels import oracle

WIDE, WIDTHS, VOCAB = 12, (8, 4), 30
NAN = float("nan")
LINEAR = oracle.random_adapters({0: (3, 5), 1: (16, 16)}, WIDE, WIDTHS)
EMBEDDING = oracle.random_adapters({0: (3,), 1: (16,)}, VOCAB, (12,))


def test_a_batch_without_adapters_needs_no_backend() -> None:
    for override in ("auto", "native"):
        assert dispatch.choose(plan([3, 2], [None, None])[1], override).backend == "none"


@pytest.mark.parametrize("override", ["auto", *dispatch.BACKENDS])
def test_a_batch_with_adapters_gets_a_backend_that_exists(override: str) -> None:
    chosen = dispatch.choose(LoraBatch((Segment(0, 0, 4),), rows=9), override)
    assert chosen.backend in dispatch.BACKENDS
    assert override in ("auto", chosen.backend)
    assert (chosen.segments, chosen.rows) == ((Segment(0, 0, 4),), 9)


def test_a_chosen_backend_gives_the_oracles_rows() -> None:
    _, batch = plan([2, 1, 3], [1, 0, None])
    batch = dispatch.choose(batch, "native")
    rows = [0, 1, 1, None, None, None]
    x, weight, ids, table = (
        torch.randn(6, WIDE),
        torch.randn(12, WIDE),
        torch.randint(VOCAB, (6,)),
        torch.randn(VOCAB, 12),
    )
    stale = 0.0  # what the pool leaves beyond an adapter's rank
    linear = dispatch.linear(x, weight, None, oracle.linear_stack(LINEAR, 2, 16, WIDE, WIDTHS, stale=stale), batch)
    assert_close(linear.double(), oracle.linear(x, weight, None, rows, LINEAR), rtol=1e-5, atol=1e-5)
    embedded = dispatch.embedding(ids, table, oracle.embedding_stack(EMBEDDING, 2, 16, VOCAB, 12, stale=stale), batch)
    assert_close(embedded.double(), oracle.embedding(ids, table, rows, EMBEDDING), rtol=1e-5, atol=1e-5)


def test_the_base_alone_reads_no_stack() -> None:
    batch = dispatch.choose(plan([4], [None])[1])
    x, weight, bias = torch.randn(4, WIDE), torch.randn(12, WIDE), torch.randn(12)
    poisoned = oracle.linear_stack({}, 2, 16, WIDE, WIDTHS, stale=NAN)
    assert torch.equal(dispatch.linear(x, weight, bias, poisoned, batch), functional.linear(x, weight, bias))
    ids, table = torch.randint(VOCAB, (4,)), torch.randn(VOCAB, 12)
    nothing = oracle.embedding_stack({}, 2, 16, VOCAB, 12, stale=NAN)
    assert torch.equal(dispatch.embedding(ids, table, nothing, batch), table[ids])


def test_a_projection_without_room_in_the_pool_is_the_base() -> None:
    batch = dispatch.choose(LoraBatch((Segment(0, 0, 4),), rows=4))
    x, weight, ids, table = (
        torch.randn(4, WIDE),
        torch.randn(12, WIDE),
        torch.randint(VOCAB, (4,)),
        torch.randn(VOCAB, 12),
    )
    assert torch.equal(dispatch.linear(x, weight, None, None, batch), functional.linear(x, weight))
    assert torch.equal(dispatch.embedding(ids, table, None, batch), table[ids])
