"""Decode attention over pages equals float64, reads only a span's own keys, and does not depend on the batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ranklet.kernels import paged_attention
from ranklet.kernels.paged_attention import decode, decode_triton, group_limit
from ranklet.kernels.paged_spans import LayerPages, PagedSpans
from ranklet.kernels.paged_torch import decode_torch
from tests.kernels.paged import attend64, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Decode = Callable[..., None]
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles the kernels on a GPU")


def small_splits(monkeypatch: pytest.MonkeyPatch, least: int = 64, most: int = 2) -> None:
    """Make splits so small that short sequences, which the interpreter computes quickly, have several."""
    monkeypatch.setattr(paged_attention, "_SPLITS", ((256, most, least),))
    monkeypatch.setattr(paged_attention, "_MOST_SPLITS", most)
    monkeypatch.setattr(paged_attention, "_SHARED_SPLITS", ((256, most, least),))


def check(
    run: Decode, lengths: list[int], heads: tuple[int, int], width: int, window: int | None,
    dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, device: torch.device = torch.device("cpu"),
    shared: Sequence[tuple[int, int]] = (),
) -> None:  # fmt: skip
    case = make_case([min(length, 1) for length in lengths], lengths, heads, width, dtype, shared=shared)
    there = case.to(device)
    out = there.empty_out()
    run(there.qkv, there.spans, there.pages, heads, window, out)
    assert_close(out.cpu().double(), attend64(case, window), rtol=tolerance, atol=tolerance, equal_nan=True)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(any),
    st.sampled_from([(1, 1), (4, 2), (8, 2), (8, 1), (6, 2)]),
    st.sampled_from([6, 16]),
    st.none() | st.integers(1, 150),
)
def test_torch_equals_float64(lengths: list[int], heads: tuple[int, int], width: int, window: int | None) -> None:
    check(decode, lengths, heads, width, window)


@needs_interpreter
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 64, 70])
def test_the_interpreted_kernels(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None) -> None:
    small_splits(monkeypatch)
    check(decode_triton, [1, 0, 64, 65, 200], heads, 16, window)


@needs_interpreter
@settings(max_examples=10)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=3).filter(any), st.none() | st.integers(1, 300), st.data())
def test_interpreted_kernels_of_any_length(lengths: list[int], window: int | None, data: Any) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_splits(monkeypatch, data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([2, 4])))
        width, dtype = data.draw(st.sampled_from([(16, torch.float32), (24, torch.float32), (32, torch.float16)]))
        check(decode_triton, lengths, (4, 2), width, window, dtype, 1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("run", [decode_torch, decode_triton])
def test_a_token_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch, run: Decode) -> None:
    small_splits(monkeypatch)
    case = make_case([1, 1, 1], [150, 3, 70], (4, 2), 16, spare_pages=4).to(DEVICE)
    together = case.empty_out()
    run(case.qkv, case.spans, case.pages, case.heads, None, together)
    for b in range(3):
        one = slice(b, b + 1)
        held = -(-int(case.spans.lengths[b]) // 64)
        parts = (case.spans.rows[one], case.spans.counts[one], case.spans.lengths[one], case.spans.table[one, :held])
        alone = PagedSpans(*parts, 1)
        out = case.empty_out()
        run(case.qkv, alone, case.pages, case.heads, None, out)
        row = int(case.spans.rows[b])
        assert torch.equal(out[row], together[row])


@needs_interpreter
def test_longer_spans_have_more_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "_SPLITS", ())
    monkeypatch.setattr(paged_attention, "_LARGEST_SPLIT", 64)
    check(decode_triton, [1, 0, 64, 65, 300], (4, 2), 16, None)


@needs_interpreter
@pytest.mark.parametrize(("heads", "limit"), [((4, 4), 16), ((4, 2), 8), ((8, 1), 2), ((6, 2), 5), ((32, 1), 1)])
@pytest.mark.parametrize("most", [1, 2])
def test_groups_that_share_keys(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], limit: int, most: int) -> None:
    assert group_limit(heads) == limit
    small_splits(monkeypatch, most=most)
    members = min(limit, 3)
    lengths = [200, 130, 129][:members] + [70, 65][: min(limit, 2)] + [64, 0, 150]
    check(decode_triton, lengths, heads, 16, None, shared=[(members, 2), (min(limit, 2), 1)])


@needs_interpreter
@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.data()), min_size=1, max_size=2))
def test_any_groups(drawn: list[tuple[int, int, Any]]) -> None:
    lengths = [common * 64 + data.draw(st.integers(1, 130)) for members, common, data in drawn for _ in range(members)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_splits(monkeypatch, most=drawn[0][2].draw(st.integers(1, 4)))
        check(decode_triton, lengths, (4, 2), 16, None, shared=[(members, common) for members, common, _ in drawn])


@needs_interpreter
def test_a_layer_with_a_window_reads_each_span_alone() -> None:
    check(decode_triton, [200, 130], (4, 2), 16, 100, shared=[(2, 2)])


@pytest.mark.parametrize("shared", [(), [(2, 1)]])
def test_arrivals_are_left_zero(monkeypatch: pytest.MonkeyPatch, shared: Sequence[tuple[int, int]]) -> None:
    small_splits(monkeypatch)
    case = make_case([1, 1], [150, 70], (4, 2), 16, shared=shared).to(DEVICE)
    arrivals = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    outs = [case.empty_out() for _ in range(3)]
    for out, counted in zip(outs, (None, arrivals, arrivals), strict=True):
        decode_triton(case.qkv, case.spans, case.pages, case.heads, None, out, counted)
        assert_close(out, outs[0], rtol=0, atol=0, equal_nan=True)
    assert not arrivals.any()


def widths(dtype: torch.dtype) -> tuple[int, ...]:
    return (64,) if dtype == torch.float32 else (64, 128)  # float32 takes long to compile


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [1, 4, 16, 80])
def test_any_number_of_spans_on_a_gpu(spans: int) -> None:
    lengths = [(1000, 2049, 70, 640, 5000, 300)[i % 6] for i in range(spans)]
    for heads in ((16, 8), (32, 8)):
        check(decode, lengths, heads, 128, None, torch.bfloat16, 1e-2, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (4, 4), (8, 1)])
@pytest.mark.parametrize("window", [None, 100, 700])
def test_decode_on_a_gpu(dtype: torch.dtype, tolerance: float, heads: tuple[int, int], window: int | None) -> None:
    lengths = [1, 0, 63, 64, 65, 255, 256, 257, 1000, 5000, 2, 0]
    for width in widths(dtype):
        check(decode, lengths, heads, width, window, dtype, tolerance, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (14, 2), (4, 4)])
def test_groups_on_a_gpu(dtype: torch.dtype, tolerance: float, heads: tuple[int, int]) -> None:
    limit = group_limit(heads)
    sizes = [(1 + i % limit, 1 + 7 * i % 20) for i in range(12)]
    lengths = [64 * pages + (1, 64, 300, 2500)[i % 4] for members, pages in sizes for i in range(members)]
    lengths += [700, 0, 64]
    for width in widths(dtype):
        check(decode, lengths, heads, width, None, dtype, tolerance, DEVICE, sizes)


@pytest.mark.gpu
def test_one_cuda_graph_serves_other_lengths_and_tables() -> None:
    groups = [(1, 0)], [(1, 0), (2, 3)], [(2, 10)]
    lengths = [900, 70, 5], [3, 940, 200], [700, 641, 90]
    cases = [
        make_case([1] * 3, each, (16, 8), 128, torch.bfloat16, shared=shared)
        for each, shared in zip(lengths, groups, strict=True)
    ]
    pool = [torch.cat(parts).to(DEVICE) for parts in zip(*(case.pages for case in cases), strict=True)]
    pages = LayerPages(*pool)
    first = cases[0].to(DEVICE)
    width = max(case.spans.table.shape[1] for case in cases)
    spans = replace(first.spans, table=torch.zeros(3, width, dtype=torch.int32, device=DEVICE))
    qkv, out = first.qkv.clone(), first.empty_out()
    decode(qkv, spans, pages, first.heads, None, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(qkv, spans, pages, first.heads, None, out)
    for index in (1, 2, 0):
        case = cases[index]
        qkv.copy_(case.qkv)
        spans.lengths.copy_(case.spans.lengths)
        own = case.spans.table + sum(len(before.pages.keys) for before in cases[:index])
        spans.table[:, : own.shape[1]].copy_(own)
        assert spans.groups is not None
        assert case.spans.groups is not None
        for there, here in zip(spans.groups, case.spans.groups, strict=True):
            there.copy_(here)
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out.cpu().double(), attend64(case, None), rtol=1e-2, atol=1e-2, equal_nan=True)
