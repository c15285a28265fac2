"""Which backend a batch gets, and that projections and embeddings use it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from ranklet.kernels import dispatch
from ranklet.kernels.batch import LoraBatch, plan, plan_evenly
from ranklet.kernels.cost_model import LoraLayer
from ranklet.kernels.crossover import Crossover, surface
from ranklet.kernels.segments import Segment
from tests.kernels import oracle

WIDE, WIDTHS, VOCAB = 12, (8, 4), 30
NAN = float("nan")
CPU = LoraLayer(((WIDE, WIDTHS),), rank=16, cuda=False)
LINEAR = oracle.random_adapters({0: (3, 5), 1: (16, 16)}, WIDE, WIDTHS)
EMBEDDING = oracle.random_adapters({0: (3,), 1: (16,)}, VOCAB, (12,))


def test_a_batch_without_adapters_has_no_backend() -> None:
    for override in ("auto", "fastest", "native"):
        assert dispatch.Backends(CPU).choose(plan([3, 2], [None, None])[1], override).backend == "none"


@pytest.mark.parametrize("override", ["auto", "fastest", *dispatch.NAMES])
def test_a_batch_with_adapters_gets_a_backend(override: str) -> None:
    chosen = dispatch.Backends(CPU).choose(LoraBatch((Segment(0, 0, 4),), rows=9), override)
    assert chosen.backend in dispatch.NAMES
    assert override in ("auto", "fastest", chosen.backend)
    assert (chosen.segments, chosen.rows) == ((Segment(0, 0, 4),), 9)


def test_projections_and_embeddings_use_the_chosen_backend() -> None:
    _, batch = plan([2, 1, 3], [1, 0, None])
    batch = dispatch.Backends(CPU).choose(batch, "native")
    rows = [0, 1, 1, None, None, None]
    x, weight, ids, table = (
        torch.randn(6, WIDE),
        torch.randn(12, WIDE),
        torch.randint(VOCAB, (6,)),
        torch.randn(VOCAB, 12),
    )
    stale = 0.0  # the pool fills with zeros beyond an adapter's rank
    linear = dispatch.linear(x, weight, None, oracle.linear_stack(LINEAR, 2, 16, WIDE, WIDTHS, stale=stale), batch)
    assert_close(linear.double(), oracle.linear(x, weight, None, rows, LINEAR), rtol=1e-5, atol=1e-5)
    embedded = dispatch.embedding(ids, table, oracle.embedding_stack(EMBEDDING, 2, 16, VOCAB, 12, stale=stale), batch)
    assert_close(embedded.double(), oracle.embedding(ids, table, rows, EMBEDDING), rtol=1e-5, atol=1e-5)


def test_two_engines_in_one_process_keep_separate_merged_weights() -> None:
    x, weight = torch.randn(4, WIDE), torch.randn(12, WIDE)
    stack = oracle.linear_stack(LINEAR, 2, 16, WIDE, WIDTHS, stale=0.0)
    keeps, keeps_nothing = dispatch.Backends(CPU, merged_bytes=10 * weight.nbytes), dispatch.Backends(CPU)
    batches = [b.choose(LoraBatch((Segment(1, 0, 4),), rows=4), "merged") for b in (keeps, keeps_nothing)]
    for backends, batch in zip((keeps, keeps_nothing), batches, strict=True):
        for _ in range(40):  # until slot 1 dominates
            backends.merged.observe(batch)
    ours, theirs = (dispatch.linear(x, weight, None, stack, batch) for batch in batches)
    assert torch.equal(ours, theirs)
    assert keeps.merged.kept.find(1, weight, stack.meta[1]) is not None
    assert keeps_nothing.merged.kept.find(1, weight, stack.meta[1]) is None
    assert (keeps.merged.kept.held_bytes, keeps_nothing.merged.kept.held_bytes) == (weight.nbytes, 0)


def test_a_batch_without_adapters_reads_no_stack() -> None:
    batch = dispatch.Backends(CPU).choose(plan([4], [None])[1])
    x, weight, bias = torch.randn(4, WIDE), torch.randn(12, WIDE), torch.randn(12)
    poisoned = oracle.linear_stack({}, 2, 16, WIDE, WIDTHS, stale=NAN)
    assert torch.equal(dispatch.linear(x, weight, bias, poisoned, batch), functional.linear(x, weight, bias))
    ids, table = torch.randint(VOCAB, (4,)), torch.randn(VOCAB, 12)
    nothing = oracle.embedding_stack({}, 2, 16, VOCAB, 12, stale=NAN)
    assert torch.equal(dispatch.embedding(ids, table, nothing, batch), table[ids])


def test_a_projection_without_a_stack_is_the_base_model() -> None:
    batch = dispatch.Backends(CPU).choose(LoraBatch((Segment(0, 0, 4),), rows=4))
    x, weight, ids, table = (
        torch.randn(4, WIDE),
        torch.randn(12, WIDE),
        torch.randint(VOCAB, (4,)),
        torch.randn(VOCAB, 12),
    )
    assert torch.equal(dispatch.linear(x, weight, None, None, batch), functional.linear(x, weight))
    assert torch.equal(dispatch.embedding(ids, table, None, batch), table[ids])


QWEN = ((1024, (2048, 1024, 1024)), (2048, (1024,)))
GPU = LoraLayer(QWEN, rank=64, cuda=True)


@pytest.mark.parametrize(
    ("adapters", "rows", "best"),
    [(1, 30_720, "merged"), (4, 30_720, "merged"), (64, 30_720, "csgmv"), (256, 4096, "csgmv"), (32, 256, "csgmv")],
)
def test_the_cost_model_agrees_with_an_h200(adapters: int, rows: int, best: str) -> None:
    assert dispatch.Backends(GPU).choose(plan_evenly(rows, adapters), "fastest").backend == best
    assert dispatch.Backends(GPU).choose(plan_evenly(rows, adapters)).backend == "csgmv", "auto rounds once"


def crossover(rows: int, adapters: int, csgmv: float, merged: float, rank: int = 64, hidden: int = 1024) -> Crossover:
    return Crossover(
        rows, adapters, rank, hidden, "attention", {"base": 0.01, "native": 9.0, "csgmv": csgmv, "merged": merged}
    )


MEASURED = [
    crossover(256, 4, 0.1, 0.2), crossover(30_720, 4, 0.5, 0.2), crossover(30_720, 64, 0.15, 0.9),
    crossover(30_720, 4, 0.1, 0.2, rank=16), crossover(30_720, 4, 9.0, 9.0, hidden=8192),
]  # fmt: skip


def test_measurements_take_precedence_over_the_cost_model() -> None:
    layer = replace(GPU, measured=surface(MEASURED, "attention", 1024))
    assert dispatch.fastest(plan_evenly(25_000, 5), layer) == "merged"
    assert dispatch.fastest(plan_evenly(25_000, 50), layer) == "csgmv"
    assert dispatch.fastest(plan_evenly(25_000, 5), replace(layer, rank=16)) == "csgmv"


def test_times_are_interpolated_between_measurements() -> None:
    found = surface(MEASURED, "attention", 1500)
    assert found is not None
    assert found.ms(30_720, 4, 64)["csgmv"] == pytest.approx(0.5)
    assert found.ms(30_720, 16, 64)["csgmv"] == pytest.approx((0.5 * 0.15) ** 0.5), "halfway in logarithms"
    assert found.ms(2804, 4, 64)["csgmv"] == pytest.approx((0.1 * 0.5) ** 0.5, rel=1e-3)
    assert found.ms(30_720, 4, 32)["csgmv"] == pytest.approx((0.1 * 0.5) ** 0.5)
    assert found.ms(1, 1, 8)["csgmv"] == 0.1, "the edge"
    assert found.ms(10**6, 999, 200) == found.ms(30_720, 64, 64)
    assert surface(MEASURED, "layer", 1024) is None
    assert surface(MEASURED, "attention", 400) is None
