"""Packed attention equals a float64 loop over requests, and no request sees another."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.attention import Spans, attend, reads_lengths_on_device


def spans(lengths: list[int], device: str = "cpu") -> Spans:
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Spans(tuple(lengths), offsets, max(lengths))


def attend64(qkv: Tensor, lengths: list[int], heads: tuple[int, int], width: int, window: int | None) -> Tensor:
    query, key = heads
    q, k, v = qkv.double().view(-1, query + 2 * key, width).split((query, key, key), dim=1)
    out = torch.empty(q.shape, dtype=torch.float64)
    start = 0
    for length in lengths:
        for t in range(length):
            first = max(0, t + 1 - (window or length))
            seen = slice(start + first, start + t + 1)
            for head in range(query):
                scores = k[seen, head * key // query] @ q[start + t, head] / width**0.5
                out[start + t, head] = scores.softmax(0) @ v[seen, head * key // query]
        start += length
    return out.view(len(qkv), -1)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    st.sampled_from([2, 6, 16]),
    st.none() | st.integers(1, 12),
)
def test_attention_is_causal_grouped_and_windowed(
    lengths: list[int], heads: tuple[int, int], width: int, window: int | None
) -> None:
    qkv = torch.randn(sum(lengths), (heads[0] + 2 * heads[1]) * width)
    ours = attend(qkv, spans(lengths), None, heads, width, window)
    assert_close(ours.double(), attend64(qkv, lengths, heads, width, window), rtol=1e-5, atol=1e-5)
    last = attend(qkv, spans(lengths), None, heads, width, window, last=True)
    assert_close(last, ours[spans(lengths).offsets[1:] - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_no_request_sees_another(window: int | None) -> None:
    lengths, heads, width = [5, 1, 7, 4], (4, 2), 8
    qkv = torch.randn(17, (4 + 4) * width)
    before = attend(qkv, spans(lengths), None, heads, width, window)
    for index, (start, length) in enumerate(zip([0, 5, 6, 13], lengths, strict=True)):
        poisoned = qkv.clone()
        poisoned[start : start + length] = float("nan")
        after = attend(poisoned, spans(lengths), None, heads, width, window)
        others = [t for t in range(17) if not start <= t < start + length]
        assert torch.equal(after[others], before[others]), f"request {index} leaks"
        assert after[start : start + length].isnan().all()


@pytest.mark.parametrize("window", [None, 3])
def test_no_token_sees_a_later_one(window: int | None) -> None:
    qkv = torch.randn(6, 3 * 8)
    before = attend(qkv, spans([6]), None, (1, 1), 8, window)
    qkv[4:] = 100.0
    after = attend(qkv, spans([6]), None, (1, 1), 8, window)
    assert_close(after[:4], before[:4])
    assert not torch.allclose(after[4:], before[4:])


def test_only_16_bit_kernels_on_a_gpu_read_lengths_on_the_device() -> None:
    cuda = torch.device("cuda", 0)
    assert reads_lengths_on_device(cuda, torch.bfloat16, (None, None))
    assert reads_lengths_on_device(cuda, torch.float16, (None,))
    assert not reads_lengths_on_device(cuda, torch.float32, (None,))
    assert not reads_lengths_on_device(torch.device("cpu"), torch.bfloat16, (None,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("window", "heads", "width"), [(None, (16, 8), 128), (None, (4, 4), 64), (30, (8, 2), 64)])
def test_attention_on_a_gpu_equals_the_loop(
    dtype: torch.dtype, window: int | None, heads: tuple[int, int], width: int
) -> None:
    lengths = [70, 1, 129, 33]
    qkv = torch.randn(sum(lengths), (heads[0] + 2 * heads[1]) * width).to(dtype)
    packed = spans(lengths, "cuda")
    ours = attend(qkv.cuda(), packed, None, heads, width, window).cpu()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    expected = attend64(qkv, lengths, heads, width, window)
    assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    last = attend(qkv.cuda(), packed, None, heads, width, window, last=True).cpu()
    assert_close(last.double(), expected[packed.offsets[1:].cpu() - 1], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths",
    [[6144] * 5, [300], [1, 2000, 17, 300, 1, 700], [129] * 33, [32_768, 1, 200]],
    ids=["even", "one", "uneven", "many", "from 1 to 32,768"],
)
@pytest.mark.parametrize(("heads", "width"), [((16, 8), 128), ((32, 8), 64), ((6, 6), 128)])
def test_cudnn_agrees_with_varlen(lengths: list[int], heads: tuple[int, int], width: int) -> None:
    pytest.importorskip("cudnn")
    packed, device = spans(lengths, "cuda"), torch.device("cuda", 0)
    assert cudnn_attention.is_available(device)
    qkv = torch.randn(sum(lengths), (heads[0] + 2 * heads[1]) * width, device=device, dtype=torch.bfloat16)
    with_cudnn = replace(packed, cudnn=cudnn_attention.cudnn_spans(packed.offsets, len(lengths), heads, width))
    expected = attend(qkv, packed, None, heads, width, None).float()
    ours = attend(qkv, with_cudnn, None, heads, width, None)
    assert (ours.float() - expected).norm() <= 4e-3 * expected.norm()
    for start, length in zip(packed.offsets.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        assert (ours[rows].float() - expected[rows]).norm() <= 6e-3 * expected[rows].norm()
    poisoned = qkv.clone()
    poisoned[: lengths[0]] = float("nan")
    assert torch.equal(attend(poisoned, with_cudnn, None, heads, width, None)[lengths[0] :], ours[lengths[0] :])
