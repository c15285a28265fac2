"""The memory of a GPU: what the pages leave is enough for every step and for its CUDA graphs."""

from pathlib import Path

import pytest
import torch

from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.modules import LINEAR_MODULES
from tests.bench.shapes import decoder, write_adapters, write_model
from tests.replicas.asking import ref
from tests.replicas.streaming import TextSink, draw

pytestmark = pytest.mark.gpu
SHAPE = decoder(
    "Qwen3ForCausalLM", layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, vocab=32_000
)
ROWS = 128
EVERYTHING = GenerateParams(
    max_tokens=12, top_p=0.9, presence_penalty=0.5, logit_bias=((7, 2.0),), seed=1, ignore_eos=True, logprobs=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    write_model(made / "model", SHAPE)
    write_adapters(made / "adapters", 3, shape=SHAPE, rank=16, modules=LINEAR_MODULES)
    return made


def make_engine(folder: Path, fraction: float, *, max_batch_tokens: int = 8192) -> Engine:
    config = EngineConfig(
        folder / "model", slots=4, max_batch_tokens=max_batch_tokens, max_model_len=2048, max_batch_requests=ROWS,
        kv_cache_fraction=fraction,
    )  # fmt: skip
    return Engine(config)


def test_a_full_engine_computes_in_the_memory_that_pages_leave(folder: Path) -> None:
    """Bursts of as many texts as there are rows, which ask the sampler for everything, until their steps are graphs."""
    _, total = torch.cuda.mem_get_info()
    engine = make_engine(folder, 0.2)
    engine.start()
    used = [None, *(ref(path) for path in sorted((folder / "adapters").iterdir()))]
    try:
        kv = engine.snapshot().kv_cache
        assert kv is not None
        page_bytes = 2 * 2 * 2 * 64 * 64 * 2  # layers, keys and values, key heads, tokens, width, bytes
        assert kv.pages * page_bytes < 0.2 * total
        for _ in range(4):
            sinks = [TextSink() for _ in range(ROWS)]
            with engine.paused():
                for i, sink in enumerate(sinks):
                    engine.submit(draw(60), used[i % len(used)], EVERYTHING, sink)
            assert all(len(sink.generation().choices[0].tokens) == EVERYTHING.max_tokens for sink in sinks)
        assert engine.healthy()
        assert engine.runner.graphs
    finally:
        engine.stop()


def test_too_little_memory_for_the_longest_text_is_refused(folder: Path) -> None:
    engine = make_engine(folder, 1e-6, max_batch_tokens=2048)
    try:
        with pytest.raises(ModelError, match=r"device memory for the KV cache: expected at least .* got .* Lower max_"):
            engine.start()
    finally:
        engine.stop()
