"""Rows of tokens against torch in float64: with torch on the CPU, with Triton interpreted or on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ranklet.kernels import csgmv, native
from ranklet.kernels.batch import Backend, LoraBatch, cut, plan
from ranklet.kernels.dispatch import embedding
from ranklet.kernels.logits import logits
from ranklet.kernels.token_rows import PAGE, TokenRows, pages_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
WIDE, VOCAB, SLOTS = 72, 300, 5
LENGTHS, OWNERS = [3, 40, 5, 2, 1, 33], [1, 0, None, 2, 3, 4]
COUNTS = {0: (37, 0), 1: (1, 120), 2: (0, 17), 4: (300, 300)}  # rows by slot and use; slot 3 has none
Own = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]  # ids and rows by use and slot


def drawn(dtype: torch.dtype, more: int = 0) -> tuple[TokenRows, Own]:
    """Return rows in pages of any order, and the same by use and slot. `more` tokens are beyond the base's."""
    counts = {(use, slot): count for slot, both in COUNTS.items() for use, count in enumerate(both) if count}
    needed = {key: pages_for(count) for key, count in counts.items()}
    pages = torch.randperm(sum(needed.values()) + 3)
    size = len(pages) * PAGE
    table = TokenRows(
        torch.full((size, WIDE), float("nan"), dtype=dtype), torch.full((size,), -7, dtype=torch.int32),
        torch.full((SLOTS, 2, 1 + len(pages)), 1 << 20, dtype=torch.int32), [[0] * SLOTS for _ in range(2)],
    )  # fmt: skip
    table.slots[:, :, 0] = 0
    own: Own = {}
    for (use, slot), count in counts.items():
        ids, rows = (
            torch.randperm(VOCAB + more)[:count].sort().values,
            (WIDE**-0.5 * torch.randn(count, WIDE)).to(dtype),
        )
        mine, pages = pages[: needed[use, slot]], pages[needed[use, slot] :]
        places = (mine[:, None] * PAGE + torch.arange(PAGE)).view(-1)[:count]
        table.rows[places], table.ids[places] = rows, ids.int()
        table.slots[slot, use, 1 : 1 + len(mine)] = mine.int()
        table.slots[slot, use, 0] = table.held[use][slot] = count
        own[use, slot] = ids, rows
    return TokenRows(table.rows.to(DEVICE), table.ids.to(DEVICE), table.slots.to(DEVICE), table.held), own


def batch_with(
    backend: Backend, table: TokenRows, *, padded: bool, more: int = 0
) -> tuple[LoraBatch, list[int | None]]:
    order, batch = plan(LENGTHS, OWNERS)
    batch = replace(batch, implementation=backend, token_rows=table, more_ids=more)
    if backend is csgmv and padded:
        tiles = tuple(each.to(torch.device(DEVICE)) for each in cut(batch, padded=True))
        batch = replace(batch, tiles=tiles, padded=True)
    elif backend is csgmv:
        batch = batch.with_tiles(torch.device(DEVICE))
    return batch, [OWNERS[i] for i in order for _ in range(LENGTHS[i])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("backend", "padded", "more"), [(native, False, 0), (native, False, 20), (csgmv, False, 0), (csgmv, True, 20)]
)
def test_embeddings_and_logits_of_tokens_with_own_rows(
    backend: Backend, padded: bool, more: int, dtype: torch.dtype
) -> None:
    table, own = drawn(dtype, more)
    batch, owners = batch_with(backend, table, padded=padded, more=more)
    weight = (WIDE**-0.5 * torch.randn(VOCAB, WIDE)).to(dtype)
    ids = torch.randint(0, VOCAB, (batch.rows,), dtype=torch.int32)
    ids[[slot == 4 for slot in owners]] = own[0, 4][0][-33:].int()  # most of the tokens beyond are among them
    wanted = weight[ids.long().clamp(max=VOCAB - 1)]
    for t, slot in enumerate(owners):
        known, rows = own.get((0, -1 if slot is None else slot), (torch.empty(0), weight))
        if (at := (known == ids[t]).nonzero()).numel():
            wanted[t] = rows[at[0, 0]]
    found = embedding(ids.to(DEVICE), weight.to(DEVICE), None, batch)
    assert torch.equal(found.cpu(), wanted)

    x = torch.randn(batch.rows, WIDE).to(dtype)
    expected = torch.full((batch.rows, VOCAB + more), -torch.inf, dtype=torch.float64)
    expected[:, :VOCAB] = x.double() @ weight.double().t()
    for t, slot in enumerate(owners):
        if slot is not None and (1, slot) in own:
            known, rows = own[1, slot]
            expected[t, known] = rows.double() @ x[t].double()
    got = logits(x.to(DEVICE), weight.to(DEVICE), None, batch).cpu()
    assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.gpu
def test_one_graph_serves_rows_that_change() -> None:
    table, _ = drawn(torch.bfloat16)
    batch, _ = batch_with(csgmv, table, padded=True)
    weight = torch.randn(VOCAB, WIDE, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(batch.rows, WIDE, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(0, VOCAB, (batch.rows,), dtype=torch.int32, device=DEVICE)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return embedding(ids, weight, None, batch), logits(x, weight, None, batch)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for kept in (1.0, 0.5, 0.0):
        counts = table.slots[:, :, 0]
        counts.copy_((counts * kept).int())
        table.rows.neg_()
        graph.replay()
        for ours, theirs in zip(replayed, run(), strict=True):
            assert torch.equal(ours, theirs)
