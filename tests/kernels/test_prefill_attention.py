"""Pieces of prompts over pages equal float64, and do not depend on cuts, on other spans and on unused pages."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels import prefill_attention
from ranklet.kernels.paged_spans import PagedSpans
from ranklet.kernels.prefill_attention import prefill, prefill_triton
from tests.kernels.paged import PagedCase, attend64, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles the kernel on a GPU")
Prefill = Callable[..., None]


def attended(case: PagedCase, window: int | None, run: Prefill = prefill) -> Tensor:
    there = case.to(DEVICE)
    out = there.empty_out()
    run(there.qkv, there.spans, there.pages, there.heads, window, out)
    return out.cpu()


def check(case: PagedCase, window: int | None, run: Prefill = prefill, tolerance: float = 1e-5) -> None:
    out = attended(case, window, run)
    assert_close(out.double(), attend64(case, window), rtol=tolerance, atol=tolerance, equal_nan=True)


def shrink(monkeypatch: pytest.MonkeyPatch, rows: int, programs: int, kept: int) -> None:
    """Make tiles and splits so small that tiny spans are cut."""
    monkeypatch.setattr(prefill_attention, "_ROWS", rows)
    monkeypatch.setattr(prefill_attention, "_LEAST_SPLIT", 64)
    monkeypatch.setattr(prefill_attention, "_SPAN_PROGRAMS", programs)
    monkeypatch.setattr(prefill_attention, "_KEPT_PROGRAMS", kept)


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
    prefill(case.qkv, case.spans, case.pages, heads, window, out)
    assert_close(out.double(), attend64(case, window), rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_interpreter
@pytest.mark.parametrize(("heads", "width", "dtype"), [((3, 1), 24, torch.float16), ((4, 1), 16, torch.float32)])
@pytest.mark.parametrize("window", [None, 1, 40, 130])
def test_the_interpreted_kernel(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], width: int, dtype: torch.dtype, window: int | None
) -> None:
    shrink(monkeypatch, 32, 12, 48)
    case = make_case([40, 0, 26, 1], [104, 0, 26, 192], heads, width, dtype)
    check(case, window, prefill_triton, 1e-5 if dtype == torch.float32 else 3e-3)


@needs_interpreter
@settings(max_examples=10)
@given(
    st.integers(1, 50), st.integers(0, 250), st.none() | st.integers(1, 300), st.sampled_from([(2, 2), (2, 1)]),
    st.sampled_from([1, 6, 20]), st.sampled_from([0, 6, 40]),
)  # fmt: skip
def test_interpreted_kernel_of_any_length(
    count: int, past: int, window: int | None, heads: tuple[int, int], programs: int, kept: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch, 16, programs, kept)
        check(make_case([count], [count + past], heads, 16), window, prefill_triton)


@needs_interpreter
@pytest.mark.parametrize("window", [None, 100])
def test_splits_give_the_same_bits_in_one_program_and_in_several(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    case = make_case([20, 0, 9, 36], [150, 0, 200, 180], (2, 1), 16)
    results = []
    for kept in (0, 6, 100):  # no span, one span, and all spans keep partial sums
        shrink(monkeypatch, 32, 12, kept)
        results.append(attended(case, window, prefill_triton).nan_to_num(nan=12345.0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("run", [prefill, prefill_triton])
@pytest.mark.parametrize("window", [None, 30])
def test_a_token_does_not_depend_on_the_cut(run: Prefill, window: int | None) -> None:
    whole = make_case([90], [100], (2, 1), 16).to(DEVICE)
    row = int(whole.spans.rows[0])
    expected, out = whole.empty_out(), whole.empty_out()
    run(whole.qkv, whole.spans, whole.pages, whole.heads, window, expected)
    starts, counts = [row, row + 23, row + 87], [23, 64, 3]
    rows, sizes, ends = (torch.tensor(part, dtype=torch.int32).to(DEVICE) for part in (starts, counts, [33, 97, 100]))
    cut = PagedSpans(rows, sizes, ends, whole.spans.table.expand(3, -1), 64)
    run(whole.qkv, cut, whole.pages, whole.heads, window, out)
    assert_close(out, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    if DEVICE.type == "cuda":
        assert torch.equal(out[row : row + 90], expected[row : row + 90])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("heads", "width"), [((16, 8), 128), ((32, 8), 64), ((4, 4), 128)])
@pytest.mark.parametrize("window", [None, 100, 700])
def test_prefill_on_a_gpu(
    dtype: torch.dtype, tolerance: float, heads: tuple[int, int], width: int, window: int | None
) -> None:
    case = make_case([300, 0, 128, 1, 257, 64], [300, 0, 1128, 1700, 320, 64], heads, width, dtype)
    check(case, window, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 2000])
def test_a_span_on_a_gpu_does_not_depend_on_the_others(window: int | None) -> None:
    """The spans keep more partial sums than a batch may, so programs compute the last ones without."""
    counts = [40 + index for index in range(100)]
    case = make_case(counts, [count + 2100 for count in counts], (4, 2), 128, torch.bfloat16).to(DEVICE)
    together = case.empty_out()
    prefill(case.qkv, case.spans, case.pages, case.heads, window, together)
    for index in (0, 50, 99):
        own = slice(index, index + 1)
        alone = case.empty_out()
        spans = PagedSpans(
            case.spans.rows[own], case.spans.counts[own], case.spans.lengths[own], case.spans.table[own], counts[index]
        )
        prefill(case.qkv, spans, case.pages, case.heads, window, alone)
        rows = slice(int(spans.rows), int(spans.rows) + counts[index])
        assert torch.equal(alone[rows], together[rows])
