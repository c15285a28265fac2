"""Stacks of LoRA weights: rank, metadata and new slots."""

import torch

from ranklet.kernels.batch import LoraBatch
from ranklet.kernels.native import embedding, linear
from ranklet.kernels.segments import Segment
from ranklet.kernels.stack import EmbeddingStack, LinearStack, SlotMeta, padded_rank


def test_a_new_slot_has_no_effect_whatever_its_memory_holds() -> None:
    batch = LoraBatch((Segment(1, 0, 3),), rows=3)
    x, weight = torch.randn(3, 6), torch.randn(10, 6)
    stack = LinearStack(torch.full((2, 2 * 16, 6), float("nan")), torch.full((2, 10, 16), float("nan")), (7, 3))
    assert stack.rank == 16
    assert [len(meta.ranks) for meta in stack.meta] == [2, 2]
    assert torch.equal(linear(x, weight, None, stack, batch), x @ weight.t())
    ids, table = torch.tensor([4, 0, 2]), torch.randn(5, 10)
    empty = EmbeddingStack(torch.full((2, 5, 32), float("nan")), torch.full((2, 10, 32), float("nan")))
    assert empty.rank == 32
    assert torch.equal(embedding(ids, table, empty, batch), table[ids])


def test_a_rank_is_padded_to_a_multiple_of_16() -> None:
    assert [padded_rank(rank) for rank in (1, 8, 16, 17, 64)] == [16, 16, 16, 32, 64]


def test_slots_do_not_share_their_metadata() -> None:
    stack = LinearStack(torch.zeros(3, 16, 4), torch.zeros(3, 4, 16), (4,))
    stack.describe(1, SlotMeta((5,), (0.25,)))
    assert [meta.ranks for meta in stack.meta] == [(0,), (5,), (0,)]
    assert stack.ranks.tolist() == [[0], [5], [0]]
    assert stack.scalings.tolist() == [[0.0], [0.25], [0.0]]
