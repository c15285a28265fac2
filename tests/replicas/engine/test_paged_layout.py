"""Steps with pages are padded for CUDA graphs: fillers change no text, and random traffic has few sizes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.paged_layout import LayoutSizes, PagedLayout, StepItems
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.model.row_decoder import suits
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import ask, assert_same, ref
from tests.replicas.engine.recording import MakeEngine
from tests.replicas.streaming import TextSink, draw

GREEDY = GenerateParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2)


def text_engine(make_engine: MakeEngine, *, pads: bool) -> Engine:
    engine = make_engine(
        slots=4, kv_cache_bytes=8 << 20, max_model_len=512, decode_slowdown=1.0, padded_steps=pads
    )  # fmt: skip
    engine.start()
    return engine


def texts(
    engine: Engine, asked: list[tuple[NDArray[np.int32], AdapterRef | None]]
) -> tuple[list[list[int]], list[list[float]]]:
    """Return tokens and logprobs of each prompt. All prompts are submitted at once."""
    sinks = [TextSink() for _ in asked]
    with engine.paused():
        for (prompt, adapter), sink in zip(asked, sinks, strict=True):
            engine.submit([prompt], adapter, GREEDY, sink)
    choices = [sink.generation().choices[0] for sink in sinks]
    logprobs = [[each.logprob for each in choice.logprobs or ()] for choice in choices]
    return [choice.tokens.tolist() for choice in choices], logprobs


def test_padding_changes_no_text(make_engine: MakeEngine, adapter_specs: list[AdapterSpec]) -> None:
    adapters = [None, *(ref(spec.path) for spec in adapter_specs[:3])]
    asked = [(prompt, adapters[i % 4]) for i, prompt in enumerate(draw(3, 64, 65, 130, 17, 200, 1, 90, 300))]
    plain, padded = (text_engine(make_engine, pads=pads) for pads in (False, True))
    (tokens, logprobs), (padded_tokens, padded_logprobs) = texts(plain, asked), texts(padded, asked)
    assert padded_tokens == tokens
    np.testing.assert_allclose(padded_logprobs, logprobs, atol=1e-4)
    prompts = draw(30, 300)
    assert_same(ask(padded, prompts).result, ask(plain, prompts).result)


@pytest.fixture
def padded(make_engine: MakeEngine) -> Engine:
    engine = make_engine(
        slots=4, kv_cache_bytes=64 << 20, max_model_len=4096, max_batch_requests=256, padded_steps=True
    )  # fmt: skip
    engine.start()
    return engine


def packed(engine: Engine, decodes: int, spans: list[TokenSpan]) -> PagedLayout:
    paged = engine.steps.paged
    assert paged is not None
    items = StepItems(np.arange(decodes, dtype=np.int32), spans, [None] * len(spans))
    return paged.packer.pack(items, *items.lora(paged.table))


def sizes_of(engine: Engine, decodes: int, spans: list[TokenSpan]) -> LayoutSizes:
    return packed(engine, decodes, spans).sizes


def test_steps_of_decodes_and_prompts_have_few_sizes(padded: Engine) -> None:
    """Each size needs a CUDA graph, which takes as long as several steps to capture."""
    paged = padded.steps.paged
    assert paged is not None
    rng, mixed, alone = np.random.default_rng(0), set[LayoutSizes](), set[LayoutSizes]()
    for _ in range(2000):
        decodes = int(rng.integers(1, 257))
        paged.table.lengths[:256] = rng.integers(1, 2000, 256)
        alone.add(sizes_of(padded, decodes, []))
        lengths = rng.multinomial(1024, rng.dirichlet(np.ones(rng.integers(1, 9))))
        starts = rng.integers(0, 2000, len(lengths))
        spans = [
            TokenSpan(np.zeros(length, np.int32), int(start), paged.text, 0)
            for length, start in zip(lengths, starts, strict=True)
            if length
        ]
        mixed.add(sizes_of(padded, decodes, spans))
    assert len(alone) <= 2 * 22
    assert len(mixed) <= 80


@pytest.mark.parametrize("row", [0, None])  # a text's prompt; an embedding
def test_row_products_serve_no_step_of_the_base_model_with_prompts(padded: Engine, row: int | None) -> None:
    """With short prompts, a step may be padded to as many tokens as decodes."""
    paged = padded.steps.paged
    assert paged is not None
    paged.table.lengths[:256] = 40
    hidden, rank = padded.runner.model.architecture.hidden, padded.runner.pool.rank

    def suits_rows(layout: PagedLayout) -> bool:
        return suits(layout.lora, hidden, rank, only_decodes=layout.only_decodes)

    as_many = 0
    for decodes in range(1, 257):
        assert suits_rows(packed(padded, decodes, []))
        for length in (1, 7, 32):
            layout = packed(padded, decodes, [TokenSpan(np.zeros(length, np.int32), 0, paged.text, row)])
            as_many += layout.sizes.tokens == layout.sizes.decodes
            assert not suits_rows(layout)
    assert as_many > 50
