"""Attention of steps that mix whole prompts, chunks and decode tokens equals each span on its own, in float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels.kv_write import write_kv
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans
from ranklet.replicas.model import cudnn_attention
from ranklet.replicas.model.attention import AttentionBatch, Spans, attend
from tests.replicas.model.test_attention import attend64

Span = tuple[str, int, int]  # kind, tokens in the batch, tokens in pages before


class MixedStep:
    """A packed step of the given spans in order, with the sequences' earlier keys in pages and free pages of NaN."""

    def __init__(
        self, spans: Sequence[Span], heads: tuple[int, int], width: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        queries, keys = heads
        self.heads, self.width, self.device = heads, width, device
        row = (queries + 2 * keys) * width
        self.sequences = [torch.randn(count + past, row).to(dtype) for _, count, past in spans]
        self.counts = [count for _, count, _ in spans]
        self.starts = [sum(self.counts[:i]) for i in range(len(spans))]
        self.qkv = torch.cat([own[past:] for own, (_, _, past) in zip(self.sequences, spans, strict=True)]).to(device)
        needed = [-(-(count + past) // PAGE_TOKENS) for _, count, past in spans]
        pages = torch.randperm(sum(needed) + 2)
        nothing = torch.full((len(pages), keys, PAGE_TOKENS, width), float("nan"), dtype=dtype, device=device)
        self.pages = LayerPages(nothing, nothing.clone())
        self.tables = [part.tolist() for part in pages[: sum(needed)].split(needed)]
        slots: list[int] = []
        for (_, count, past), own, table in zip(spans, self.sequences, self.tables, strict=True):
            every = [table[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(count + past)]
            write_kv(own[:past].to(device), self.on_device(every[:past]), self.pages, heads)
            slots += every[past:]
        self.batch = AttentionBatch(
            self.fresh(spans), self.paged(spans, "chunk"), self.paged(spans, "decode"),
            self.on_device(slots), self.on_device([s + c - 1 for s, c in zip(self.starts, self.counts, strict=True)]),
        )  # fmt: skip
        write_kv(self.qkv, self.on_device(slots), self.pages, heads)

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def fresh(self, spans: Sequence[Span]) -> Spans | None:
        own = [i for i, (kind, _, _) in enumerate(spans) if kind == "fresh"]
        if not own:
            return None
        lengths = [self.counts[i] for i in own]
        offsets = self.on_device([sum(lengths[:i]) for i in range(len(own) + 1)])
        return Spans(tuple(lengths), offsets, max(lengths), starts=self.on_device([self.starts[i] for i in own]))

    def paged(self, spans: Sequence[Span], wanted: str) -> PagedSpans | None:
        own = [i for i, (kind, _, _) in enumerate(spans) if kind == wanted]
        if not own:
            return None
        widest = max(len(self.tables[i]) for i in own) + 1
        table = torch.zeros(len(own), widest, dtype=torch.int32)
        for line, i in zip(table, own, strict=True):
            line[: len(self.tables[i])] = torch.tensor(self.tables[i])
        return PagedSpans(
            self.on_device([self.starts[i] for i in own]), self.on_device([self.counts[i] for i in own]),
            self.on_device([len(self.sequences[i]) for i in own]), table.to(self.device),
            max(self.counts[i] for i in own),
        )  # fmt: skip

    def expected(self, window: int | None) -> Tensor:
        parts = [
            attend64(own, [len(own)], self.heads, self.width, window)[len(own) - count :]
            for own, count in zip(self.sequences, self.counts, strict=True)
        ]
        return torch.cat(parts)

    def check(self, window: int | None, tolerance: float) -> None:
        arguments = (self.qkv, self.batch, self.pages, self.heads, self.width, window)
        expected = self.expected(window)
        assert_close(attend(*arguments).cpu().double(), expected, rtol=tolerance, atol=tolerance)
        assert self.batch.ends is not None
        last = attend(*arguments, last=True).cpu().double()
        assert_close(last, expected[self.batch.ends.cpu()], rtol=tolerance, atol=tolerance)


SPANS = st.one_of(
    st.tuples(st.just("fresh"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("chunk"), st.integers(1, 9), st.integers(0, 70)),
    st.tuples(st.just("decode"), st.just(1), st.integers(0, 70)),
)


@settings(max_examples=30)
@given(st.lists(SPANS, min_size=1, max_size=5), st.none() | st.integers(1, 80))
def test_each_span_sees_only_its_own_keys(spans: list[Span], window: int | None) -> None:
    MixedStep(spans, (4, 2), 6, torch.float32).check(window, 1e-5)


def test_padding_behind_scattered_sequences_is_not_written() -> None:
    step = MixedStep([("fresh", 3, 0), ("decode", 1, 5), ("fresh", 2, 0)], (4, 2), 6, torch.float32)
    fresh = step.batch.fresh
    assert fresh is not None
    padded = Spans(
        (*fresh.lengths, 2), torch.cat((fresh.offsets, fresh.offsets[-1:])), 3, starts=step.on_device([0, 4, 0])
    )
    step.batch = AttentionBatch(padded, None, step.batch.decodes, step.batch.kv_slots, step.batch.ends)
    step.check(None, 1e-5)


MIXED = [
    ("fresh", 70, 0), ("decode", 1, 200), ("fresh", 300, 0), ("chunk", 150, 500), ("decode", 1, 0), ("chunk", 1, 64),
    ("fresh", 1, 0), ("chunk", 64, 0),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-5)])
@pytest.mark.parametrize("window", [None, 40])
def test_mixed_steps_on_a_gpu(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    MixedStep(MIXED, (4, 2), 64, dtype, "cuda").check(window, tolerance)


@pytest.mark.gpu
def test_cudnn_attends_to_scattered_sequences() -> None:
    pytest.importorskip("cudnn")
    step = MixedStep(MIXED, (4, 2), 64, torch.bfloat16, "cuda")
    fresh = step.batch.fresh
    assert fresh is not None
    cudnn = cudnn_attention.cudnn_spans(fresh.offsets, len(fresh.lengths), step.heads, step.width, fresh.starts)
    step.batch = AttentionBatch(
        Spans(fresh.lengths, fresh.offsets, fresh.longest, cudnn, fresh.starts), step.batch.chunks,
        step.batch.decodes, step.batch.kv_slots, step.batch.ends,
    )  # fmt: skip
    step.check(None, 2e-2)
