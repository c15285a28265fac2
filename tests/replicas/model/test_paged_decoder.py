"""A prompt computed in chunks and token by token over pages has the states of the prompt computed at once."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ranklet.kernels.batch import plan
from ranklet.kernels.paged_spans import PAGE_TOKENS, LayerPages, PagedSpans
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.attention import AttentionBatch, Spans
from ranklet.replicas.model.decoder import Decoder, DeviceBatch, Stacks
from tests.assets.make import make_model

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2}
TOKENS = 150


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


class PagedSequence:
    """One sequence whose keys and values are kept in pages of a decoder on the CPU."""

    def __init__(self, model: Decoder, ids: Tensor) -> None:
        shape = model.architecture
        self.model, self.ids = model, ids
        self.table = [3, 0, 4]
        one = torch.full((5, shape.kv_heads, PAGE_TOKENS, shape.head_dim), float("nan"))
        self.pages = [LayerPages(one.clone(), one.clone()) for _ in range(shape.layers)]

    def step(self, begin: int, end: int, *, last: bool = False) -> Tensor:
        count, positions = end - begin, torch.arange(begin, end, dtype=torch.int32)
        slots = ints(*(self.table[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(begin, end)))
        spans = PagedSpans(ints(0), ints(count), ints(end), ints(*self.table)[None], count)
        ends = ints(count - 1)
        if begin == 0:
            batch = AttentionBatch(Spans((count,), ints(0, count), count), kv_slots=slots, ends=ends)
        elif count == 1:
            batch = AttentionBatch(decodes=spans, kv_slots=slots, ends=ends)
        else:
            batch = AttentionBatch(chunks=spans, kv_slots=slots, ends=ends)
        lora = plan([count], [None])[1]
        narrow = plan([1], [None])[1] if last else None
        device = DeviceBatch(self.ids[begin:end], positions, batch, lora, narrow)
        return self.model.forward(device, [Stacks()] * len(self.pages), None, pages=self.pages)


@pytest.mark.parametrize("config", [{}, {"architecture": "mistral", "config": {"sliding_window": 70}}])
def test_chunks_and_single_tokens_equal_the_whole_prompt(config: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", head_dim=16, **SMALL, **config)
    settings = read_config(folder)
    model = Decoder(read_architecture(settings), settings, folder, 200, torch.device("cpu"), torch.float32)
    ids = torch.randint(model.architecture.vocab, (TOKENS,), dtype=torch.int32)
    whole = DeviceBatch(
        ids, torch.arange(TOKENS, dtype=torch.int32), Spans((TOKENS,), ints(0, TOKENS), TOKENS),
        plan([TOKENS], [None])[1],
    )  # fmt: skip
    with torch.inference_mode():
        expected = model.forward(whole, [Stacks()] * model.architecture.layers, None)
        sequence = PagedSequence(model, ids)
        cuts = [0, 50, 120, *range(121, TOKENS + 1)]
        parts = [sequence.step(begin, end) for begin, end in pairwise(cuts)]
        assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)
        assert_close(sequence.step(120, TOKENS, last=True), expected[-1:], rtol=1e-4, atol=1e-4)
