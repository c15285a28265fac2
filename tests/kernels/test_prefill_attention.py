"""Chunks of prompts over pages equal float64, read only a span's own keys, and do not depend on the cut."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ranklet.kernels import prefill_attention
from ranklet.kernels.paged_attention import PagedSpans
from ranklet.kernels.prefill_attention import TILE_QUERIES, prefill, prefill_triton, query_tiles
from tests.kernels.paged import PagedCase, attend64, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles the kernel on a GPU")
Prefill = Callable[..., None]


def check(
    case: PagedCase, window: int | None, run: Prefill = prefill, tolerance: float = 1e-5, spare_tiles: int = 2
) -> None:
    there = case.to(DEVICE)
    exact = query_tiles(case.spans.counts.numpy())
    tiles = query_tiles(case.spans.counts.numpy(), len(exact) + spare_tiles)
    out = there.empty_out()
    run(there.qkv, there.spans, there.pages, there.heads, window, out, torch.from_numpy(tiles).to(DEVICE))
    assert_close(out.cpu().double(), attend64(case, window), rtol=tolerance, atol=tolerance, equal_nan=True)


@given(st.lists(st.integers(0, 500), max_size=6), st.integers(0, 3))
def test_tiles_cover_each_query_once(counts: list[int], spare: int) -> None:
    exact = query_tiles(counts)
    tiles = query_tiles(counts, len(exact) + spare)
    assert tiles.dtype == np.int32
    assert np.array_equal(tiles[: len(exact)], exact)
    assert tiles[len(exact) :].tolist() == [[-1, 0]] * spare
    covered = [
        (int(span), query) for span, first in exact for query in range(first, min(first + TILE_QUERIES, counts[span]))
    ]
    assert covered == [(span, query) for span, count in enumerate(counts) for query in range(count)]
    assert all(first < counts[span] for span, first in exact)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 140)), min_size=1, max_size=3).filter(
        lambda spans: any(count for count, _ in spans)
    ),
    st.sampled_from([(1, 1), (4, 2), (8, 1), (6, 2)]),
    st.none() | st.integers(1, 150),
)
def test_torch_equals_float64(spans: list[tuple[int, int]], heads: tuple[int, int], window: int | None) -> None:
    counts = [count for count, _ in spans]
    lengths = [count and count + past for count, past in spans]
    case = make_case(counts, lengths, heads, 6)
    out = case.empty_out()
    prefill(case.qkv, case.spans, case.pages, heads, window, out, torch.from_numpy(query_tiles(counts)))
    assert_close(out.double(), attend64(case, window), rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_interpreter
@pytest.mark.parametrize(("heads", "width", "dtype"), [((2, 1), 16, torch.float32), ((3, 1), 24, torch.float16)])
@pytest.mark.parametrize("window", [None, 1, 40, 130])
def test_the_interpreted_kernel(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], width: int, dtype: torch.dtype, window: int | None
) -> None:
    monkeypatch.setattr(prefill_attention, "TILE_QUERIES", 32)
    case = make_case([40, 0, 64, 1], [40, 0, 128, 190], heads, width, dtype)
    check(case, window, prefill_triton, 1e-5 if dtype == torch.float32 else 3e-3)


@needs_interpreter
@settings(max_examples=10)
@given(st.integers(1, 50), st.integers(0, 150), st.none() | st.integers(1, 200))
def test_interpreted_kernel_of_any_length(count: int, past: int, window: int | None) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(prefill_attention, "TILE_QUERIES", 16)
        check(make_case([count], [count + past], (2, 1), 16), window, prefill_triton)


@pytest.mark.parametrize("run", [prefill, prefill_triton])
@pytest.mark.parametrize("window", [None, 30])
def test_a_token_does_not_depend_on_the_cut(run: Prefill, window: int | None) -> None:
    whole = make_case([90], [100], (2, 1), 16).to(DEVICE)
    row = int(whole.spans.rows[0])
    expected, out = whole.empty_out(), whole.empty_out()
    run(
        whole.qkv, whole.spans, whole.pages, whole.heads, window, expected,
        torch.from_numpy(query_tiles([90])).to(DEVICE),
    )  # fmt: skip
    starts, counts = [row, row + 23, row + 87], [23, 64, 3]
    rows, sizes, ends = (torch.tensor(part, dtype=torch.int32).to(DEVICE) for part in (starts, counts, [33, 97, 100]))
    cut = PagedSpans(rows, sizes, ends, whole.spans.table.expand(3, -1), 64)
    run(whole.qkv, cut, whole.pages, whole.heads, window, out, torch.from_numpy(query_tiles(counts)).to(DEVICE))
    assert_close(out, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    if DEVICE.type == "cuda":
        assert torch.equal(out[row : row + 90], expected[row : row + 90])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (4, 4)])
@pytest.mark.parametrize("window", [None, 100, 700])
def test_prefill_on_a_gpu(dtype: torch.dtype, tolerance: float, heads: tuple[int, int], window: int | None) -> None:
    for width in (64, 128):
        case = make_case([300, 0, 128, 1, 257, 64], [300, 0, 1128, 700, 320, 64], heads, width, dtype)
        check(case, window, tolerance=tolerance)
