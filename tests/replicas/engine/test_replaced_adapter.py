"""An adapter is replaced while it generates: each stream ends with the weights that it began with."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.model.architecture import read_architecture, read_config
from tests.assets.adapters import AdapterSpec, save_adapter
from tests.replicas.asking import ref, submit, until
from tests.replicas.engine.recording import MakeEngine
from tests.replicas.streaming import TextSink, draw

TOKENS = 150
PARAMS = GenerateParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
PROMPTS = draw(70, 75, 80)


@dataclass(frozen=True)
class TwoRevisions:
    """Two folders with weights for one adapter, and the texts that they generate for each prompt."""

    folders: tuple[Path, Path]
    texts: tuple[list[list[int]], list[list[int]]]


def stream(engine: Engine, adapter: AdapterRef) -> list[TextSink]:
    sinks = [TextSink() for _ in PROMPTS]
    for prompt, sink in zip(PROMPTS, sinks, strict=True):
        engine.submit([prompt], adapter, PARAMS, sink)
    return sinks


def texts_of(sinks: list[TextSink]) -> list[list[int]]:
    texts = [sink.generation().choices[0].tokens.tolist() for sink in sinks]
    assert texts == [sink.tokens[0] for sink in sinks]
    return texts


@pytest.fixture(scope="module")
def revisions(text_family: tuple[Path, list[AdapterSpec]], tmp_path_factory: pytest.TempPathFactory) -> TwoRevisions:
    """The texts come from an engine without a prefix cache, which serves each folder under a name of its own."""
    model, _ = text_family
    folder = tmp_path_factory.mktemp("revisions")
    one, two = (
        save_adapter(model, folder / f"weights-{seed}", r=8, target_modules=["q_proj", "up_proj"], seed=seed)
        for seed in (1, 2)
    )
    engine = Engine(EngineConfig(model, slots=2, kv_cache_bytes=8 << 20, max_model_len=512, prefix_cache=False))
    engine.start()
    texts = texts_of(stream(engine, ref(one))), texts_of(stream(engine, ref(two)))
    engine.stop()
    assert all(old != new for old, new in zip(*texts, strict=True))
    return TwoRevisions((one, two), texts)


@pytest.mark.parametrize(("slots", "pages"), [(2, 60), (2, 8), (1, 8)])
def test_streams_finish_on_their_revision(
    make_engine: MakeEngine,
    text_family: tuple[Path, list[AdapterSpec]],
    tmp_path: Path,
    revisions: TwoRevisions,
    slots: int,
    pages: int,
) -> None:
    """With 8 pages, streams are preempted and start again after the files have changed."""
    model, _ = text_family
    shape = read_architecture(read_config(model))
    page_bytes = shape.layers * 2 * shape.kv_heads * PAGE_TOKENS * shape.head_dim * 4
    engine = make_engine(
        model,
        slots=slots,
        kv_cache_bytes=pages * page_bytes,
        max_model_len=512,
        host_cache_bytes=0,
        decode_slowdown=1.0,
    )
    engine.start()
    live = tmp_path / "live"
    shutil.copytree(revisions.folders[0], live)
    before = ref(live)
    old = stream(engine, before)
    until(lambda: any(sink.tokens for sink in old))
    shutil.copy(revisions.folders[1] / WEIGHTS_FILE, live / WEIGHTS_FILE)
    after = ref(live)
    assert (after.name, after.revision != before.revision) == (before.name, True)
    until(lambda: all(sink.tokens for sink in old))  # a stream that has not started may be refused: its files are gone
    new = stream(engine, after)
    while not all(len(sink.tokens[0]) >= TOKENS - 1 for sink in old):
        is_free = engine.release(after.name, after.revision)
        assert not is_free or all(len(sink.tokens[0]) >= TOKENS - 1 for sink in old)
        submit(engine, draw(20)).result(60)  # leaves the lock to the streams, and shares their steps
    assert texts_of(old) == revisions.texts[0]
    assert texts_of(new) == revisions.texts[1]
    assert [sink.generation().cached_tokens for sink in new] == [0] * len(PROMPTS), "pages of the old revision"
    until(lambda: engine.release(after.name, after.revision))
    assert [each.revision for each in engine.report()] == [after.revision]
    again = stream(engine, after)
    assert texts_of(again) == revisions.texts[1]
    assert pages == 8 or all(sink.generation().cached_tokens == PAGE_TOKENS for sink in again)
    cache = engine.snapshot().kv_cache
    assert cache is not None
    assert (cache.preemptions > 0) == (pages == 8)
    engine.check_integrity()
