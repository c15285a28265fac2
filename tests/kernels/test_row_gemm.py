"""Products of short batches against float64: interpreted on the CPU, compiled on a GPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels import row_gemm, row_norm
from ranklet.kernels.batch import LoraBatch, cut, plan
from ranklet.kernels.row_gemm import NextNorm, NormedRows, RowLora, Workspace
from ranklet.kernels.row_gemm_tiles import SplitTile, ThinTile
from ranklet.kernels.stack import LinearStack
from tests.kernels import oracle
from tests.kernels.adapters import NAN, slots_by_row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
THIN, SPLIT = ThinTile(16, 16, 4, 2, early=False, own=True), SplitTile(16, 16, 16, 2, 4, 2)
TILES = [THIN, ThinTile(16, 16, 4, 2, early=True), SPLIT, SplitTile(16, 16, 16, 1, 4, 2)]
IDS = ["thin", "early and shrunk before", "split", "whole"]
RANKS: dict[int, tuple[int, ...]] = {
    0: (1, 1, 1),
    1: (3, 0, 8),
    2: (8, 8, 8),
    3: (10, 16, 9),
    4: (16, 16, 16),
    5: (0, 0, 0),
}
MIXED: list[int | None] = [4, 3, 1, 0, None]  # five adapters are padded to 16: see "a row each" in MIXES
EPS = 1e-6


def stack_of(
    ranks: dict[int, tuple[int, ...]], wide: int, widths: tuple[int, ...], dtype: torch.dtype, rank: int = 16
) -> Any:
    """Return adapters and their stack. Slots of no adapter hold NaN, and slots are zero beyond their rank."""
    cut_ranks = {slot: of[: len(widths)] for slot, of in ranks.items()}
    adapters = oracle.random_adapters(cut_ranks, wide, widths, dtype=dtype)
    slots = max(ranks) + 2
    stack = oracle.linear_stack(adapters, slots, rank, wide, widths, stale=0.0, device=str(DEVICE))
    for slot in set(range(slots)) - set(ranks):
        stack.a[slot] = stack.b[slot] = NAN
    return adapters, stack


def batch_of(slots: list[int | None]) -> LoraBatch:
    return plan([1] * len(slots), slots)[1]


def lora_of(batch: LoraBatch, stack: LinearStack) -> RowLora | None:
    tiles = cut(batch, padded=True)
    return RowLora(stack, tiles[0].to(DEVICE)) if tiles else None


class RowCase:
    """One batch, and what its products must give in float64."""

    def __init__(
        self, slots: list[int | None], wide: int = 48, widths: tuple[int, ...] = (32, 16, 16), *,
        dtype: torch.dtype = torch.float32, bias: bool = False, ranks: dict[int, tuple[int, ...]] | None = None,
        rank: int = 16, terms: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.batch = batch_of(slots)
        adapters, stack = stack_of(ranks or RANKS, wide, widths, dtype, rank)
        count, width = self.batch.rows, sum(widths)
        self.x = torch.randn(count, wide).to(dtype)
        self.weight = (torch.randn(width, wide) * wide**-0.5).to(dtype)
        self.bias = torch.randn(width).to(dtype) if bias else None
        self.lora, self.workspace = lora_of(self.batch, stack), Workspace(DEVICE, max(64, width))
        # The norm before the product: parts of sums of squares, for rows that differ in size.
        self.squares = torch.rand(count, 3) * torch.logspace(-0.5, 1, count)[:, None] * wide
        scale = (self.squares.double().sum(1) / wide + EPS).rsqrt()[:, None]
        slots_of = slots_by_row(self.batch)
        self.product = oracle.linear(self.x, self.weight, None, slots_of, adapters)
        offset = 0.0 if self.bias is None else self.bias.double()
        self.normed, self.product = self.product * scale + offset, self.product + offset
        if terms and self.lora is not None:
            given = oracle.give_terms(stack, terms)
            self.lora = self.lora._replace(terms=stack.terms)
            self.normed = oracle.with_terms(self.normed, slots_of, given)
            self.product = oracle.with_terms(self.product, slots_of, given)

    def rows(self, *, normed: bool) -> NormedRows:
        return NormedRows(self.x.to(DEVICE), self.squares.to(DEVICE) if normed else None, EPS)

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(DEVICE), None if self.bias is None else self.bias.to(DEVICE)


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    found, tolerance = found.cpu().double(), TOLERANCE[dtype]
    assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(1.0, float(wanted.abs().max()) / 8))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def check_products(case: RowCase, dtype: torch.dtype, tile: ThinTile | SplitTile | None) -> None:
    for normed in (False, True):
        y = row_gemm.plain(case.rows(normed=normed), *case.weights, case.lora, case.workspace, tile=tile)
        check(y, case.normed if normed else case.product, dtype)


MIXES: dict[str, list[int | None]] = {
    "one row": [3], "one adapter": [4] * 5, "one adapter and base rows": [2, None, None], "base only": [None, None],
    "a row each": [4, 3, 2, 1, 0, None], "nothing targeted": [5, 5], "some targeted": [5, 1, 1, 3],
    "runs across blocks": [4] * 17 + [3] * 12 + [0] * 5 + [None] * 6,
}  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
def test_plain(slots: list[int | None], tile: ThinTile | SplitTile) -> None:
    check_products(RowCase(slots), torch.float32, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("slots", [[3], MIXED], ids=["one", "mixed"])
def test_dtypes_bias_and_odd_widths(dtype: torch.dtype, slots: list[int | None], tile: ThinTile | SplitTile) -> None:
    check_products(RowCase(slots, wide=40, dtype=dtype, bias=True), dtype, tile)
    check_products(RowCase(slots, wide=72, widths=(48,), dtype=dtype, bias=True), dtype, tile)


@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("slots", [[3], [None, None], MIXED], ids=["one", "base", "mixed"])
def test_gated(slots: list[int | None], bias: bool, tile: ThinTile | SplitTile) -> None:
    case = RowCase(slots, widths=(32, 32), bias=bias)
    y = row_gemm.gated(case.rows(normed=True), *case.weights, case.lora, case.workspace, tile=tile)
    gate, up = case.normed.chunk(2, dim=1)
    check(y, torch.nn.functional.silu(gate) * up, torch.float32)


@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("slots", [[3], [None, None], MIXED], ids=["one", "base", "mixed"])
def test_added(slots: list[int | None], tile: ThinTile | SplitTile) -> None:
    case = RowCase(slots, widths=(48,))
    before, norm = torch.randn(case.batch.rows, 48), torch.rand(48) + 0.5
    wanted = before.double() + case.product
    for weight in (None, NextNorm(norm.to(DEVICE), EPS)):
        residual = before.clone().to(DEVICE)
        rows = row_gemm.added(
            case.rows(normed=False), *case.weights, case.lora, case.workspace, residual, weight, tile=tile
        )
        check(residual, wanted, torch.float32)
    assert rows.squares is not None
    check(rows.x, wanted * norm.double(), torch.float32)
    check(rows.squares.sum(1), (wanted**2).sum(1), torch.float32)


@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("slots", [[5], [4, 4, 3, 5, 0, None]], ids=["one without LoRA", "mixed"])
def test_column_terms(slots: list[int | None], tile: ThinTile | SplitTile) -> None:
    terms = (3, 5)
    check_products(RowCase(slots, bias=True, terms=terms), torch.float32, tile)
    case = RowCase(slots, widths=(32, 32), bias=True, terms=terms)
    y = row_gemm.gated(case.rows(normed=True), *case.weights, case.lora, case.workspace, tile=tile)
    gate, up = case.normed.chunk(2, dim=1)
    check(y, torch.nn.functional.silu(gate) * up, torch.float32)
    case = RowCase(slots, widths=(48,), terms=terms)
    before = torch.randn(case.batch.rows, 48)
    residual = before.clone().to(DEVICE)
    row_gemm.added(case.rows(normed=False), *case.weights, case.lora, case.workspace, residual, None, tile=tile)
    check(residual, before.double() + case.product, torch.float32)


@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_many_adapters(tile: ThinTile | SplitTile) -> None:
    slots = 40
    check_products(RowCase([*range(slots)], widths=(16,), ranks=dict.fromkeys(range(slots), (4,))), torch.float32, tile)


@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_a_row_does_not_depend_on_its_neighbours(tile: ThinTile | SplitTile) -> None:
    case = RowCase([4, 4, 2, None], dtype=torch.float16)
    whole = row_gemm.plain(case.rows(normed=True), *case.weights, case.lora, case.workspace, tile=tile)
    slots = slots_by_row(case.batch)
    for row in range(len(slots)):
        others: list[int | None] = [0, 1, 3]  # other adapters, before and behind the row
        batch = batch_of([*others, slots[row]])
        at = slots_by_row(batch).index(slots[row])
        x, squares = torch.randn(4, 48).half(), torch.rand(4, 3)
        x[at], squares[at] = case.x[row], case.squares[row]
        assert case.lora is not None
        rows = NormedRows(x.to(DEVICE), squares.to(DEVICE), EPS)
        found = row_gemm.plain(rows, *case.weights, lora_of(batch, case.lora.stack), case.workspace, tile=tile)
        assert torch.equal(found[at], whole[row])


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("slots", [[None, None], [4, 3, 2, 1, 0, None]], ids=["base", "mixed"])
def test_wide_tiles(slots: list[int | None], split: int) -> None:
    tile = SplitTile(16, 64, 16, split, 4, 2, run_ranks=32)  # two adapters in one product: the fifth has its own
    check_products(RowCase(slots, widths=(128,)), torch.float32, tile)
    case = RowCase(slots, widths=(64, 64))
    y = row_gemm.gated(case.rows(normed=True), *case.weights, case.lora, case.workspace, tile=tile)
    gate, up = case.normed.chunk(2, dim=1)
    check(y, torch.nn.functional.silu(gate) * up, torch.float32)


@pytest.mark.parametrize(
    ("wide", "widths"),
    [
        (1024, (2048, 1024, 1024)),
        (576, (576, 192, 192)),
        (1536, (576,)),
        (4096, (4096,)),
        (8960, (1536,)),
        (576, (1536, 1536)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 7, 16, 40, 200, 330, 1000])
@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.gpu
def test_real_widths(rows: int, rank: int, wide: int, widths: tuple[int, ...]) -> None:
    slices = len(widths)
    ranks: dict[int, tuple[int, ...]] = {i: tuple((i * 7 + j) % (rank + 1) for j in range(slices)) for i in range(40)}
    mixes: list[list[int | None]] = [
        [None] * rows, [3] * rows, [i % 40 for i in range(rows)], [*[5] * (rows // 2), *[None] * (rows - rows // 2)],
    ]  # fmt: skip
    for slots in mixes:
        terms = (3, 5, 8) if rank == 48 else ()
        case = RowCase(slots, wide, widths, dtype=torch.bfloat16, bias=True, ranks=ranks, rank=rank, terms=terms)
        if slices == 2:
            y = row_gemm.gated(case.rows(normed=True), *case.weights, case.lora, case.workspace)
            gate, up = case.normed.chunk(2, dim=1)
            check(y, torch.nn.functional.silu(gate) * up, torch.bfloat16)
        elif slices == 1:
            before, norm = torch.randn(rows, sum(widths)), torch.rand(sum(widths)) + 0.5
            residual, next_norm = before.to(DEVICE), NextNorm(norm.bfloat16().to(DEVICE), EPS)
            row_gemm.added(case.rows(normed=False), *case.weights, case.lora, case.workspace, residual, next_norm)
            check(residual, before.double() + case.product, torch.bfloat16)
        else:
            check_products(case, torch.bfloat16, None)


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 512, 1024])
@pytest.mark.gpu
def test_a_thousand_replays_give_the_same_bits(rows: int) -> None:
    """A chain of products as in a layer, so that each launch overlaps with the next one."""
    hidden, inner, workspace = 1024, 3072, Workspace(DEVICE, 1024)
    slots: list[int | None] = [i % 8 for i in range(rows)]
    ranks: dict[int, tuple[int, ...]] = dict.fromkeys(range(8), (16, 16))
    batch = batch_of(slots)
    stacks = [stack_of(ranks, hidden, (inner, inner), torch.bfloat16)[1]]
    stacks.append(stack_of(ranks, inner, (hidden,), torch.bfloat16)[1])
    weights = [torch.randn(2 * inner, hidden) * hidden**-0.5, torch.randn(hidden, inner) * inner**-0.5]
    gate_up, down = (weight.to(DEVICE, torch.bfloat16) for weight in weights)
    norm = NextNorm(torch.rand(hidden, device=DEVICE).bfloat16() + 0.5, EPS)
    embedded = torch.randn(rows, hidden, device=DEVICE).bfloat16()

    loras = [lora_of(batch, stack) for stack in stacks]

    def step(own: list[RowLora | None]) -> Tensor:
        residual, scaled, squares = row_norm.start(embedded, norm.weight)
        rows_ = NormedRows(scaled, squares, EPS)
        for _ in range(12):
            gated = row_gemm.gated(rows_, gate_up, None, own[0], workspace)
            rows_ = row_gemm.added(NormedRows(gated), down, None, own[1], workspace, residual, norm)
        return residual

    bases: list[RowLora | None] = [None, None]
    for own in (bases, loras):
        eager = step(own).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step(own)
        for _ in range(1000):
            graph.replay()
            assert torch.equal(replayed, eager)
