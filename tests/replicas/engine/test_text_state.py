"""What operators see of an engine that generates text: its pages, its health, and the adapters that streams use."""

from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from time import sleep

import pytest

from ranklet.replicas.adapters.reference import AdapterRef
from ranklet.replicas.cache.pages import PAGE_TOKENS, IntegrityError, PagePool
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.engine.stats import KvCacheState
from ranklet.replicas.model.architecture import read_architecture, read_config
from tests.assets.adapters import AdapterSpec
from tests.replicas.asking import PATIENCE_S, ref, until
from tests.replicas.engine.recording import MakeEngine, RecordingListener
from tests.replicas.streaming import GREEDY, TextSink, draw

PAUSE_S = 0.001  # of threads that would keep the engine's lock to themselves


@pytest.fixture
def text_engine(make_engine: MakeEngine) -> Engine:
    engine = make_engine(kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    return engine


def cache_of(engine: Engine) -> KvCacheState:
    cache = engine.snapshot().kv_cache
    assert cache is not None
    return cache


def page_bytes(model_dir: Path) -> int:
    shape = read_architecture(read_config(model_dir))
    return shape.layers * 2 * shape.kv_heads * PAGE_TOKENS * shape.head_dim * 4


def test_the_snapshot_counts_pages_and_shared_tokens(text_engine: Engine) -> None:
    prompt, sink = draw(2 * PAGE_TOKENS + 10), TextSink()
    ticket = text_engine.submit(prompt, None, GenerateParams(max_tokens=300, ignore_eos=True), sink)
    until(lambda: bool(sink.tokens))
    during = cache_of(text_engine)
    assert (during.sequences, during.shared_tokens) == (1, 0)
    assert during.asked_tokens == 2 * PAGE_TOKENS
    assert 3 <= during.used_pages <= during.pages
    ticket.cancel()
    until(lambda: cache_of(text_engine).sequences == 0)
    after = cache_of(text_engine)
    assert (after.used_pages, after.preemptions, after.evicted_pages) == (0, 0, 0)
    assert 2 <= after.cached_pages < after.pages
    again = TextSink()
    text_engine.submit(prompt, None, GREEDY, again)
    again.generation()
    assert cache_of(text_engine).shared_tokens == 2 * PAGE_TOKENS
    text_engine.check_integrity()


def test_an_engine_for_embeddings_has_no_key_value_cache(engine: Engine) -> None:
    assert engine.snapshot().kv_cache is None
    engine.check_integrity()
    assert engine.problem() is None


def test_a_stream_is_running_between_its_steps(text_engine: Engine, adapter_specs: list[AdapterSpec]) -> None:
    adapter, sink, shots = ref(adapter_specs[0].path), TextSink(), []
    sink.on_piece = lambda: shots.append(text_engine.snapshot())
    text_engine.submit(draw(20), adapter, GenerateParams(max_tokens=30, ignore_eos=True), sink)
    sink.generation()
    for shot in shots[:-1]:  # at the last piece it has ended
        assert (shot.waiting_requests, shot.running_requests) == (0, 1)
        assert (shot.waiting_adapters, shot.running_adapters) == ((), (adapter.name,))


def test_tokens_of_texts_are_counted_by_adapter(make_engine: MakeEngine, adapter_specs: list[AdapterSpec]) -> None:
    listener, adapter = RecordingListener(), ref(adapter_specs[0].path)
    engine = make_engine(listener=listener, kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    sinks = [TextSink() for _ in range(2)]
    engine.submit(draw(20), adapter, GenerateParams(max_tokens=7, n=2, ignore_eos=True), sinks[0])
    engine.submit(draw(20), None, GREEDY, sinks[1])
    for sink in sinks:
        sink.generation()

    def counted(name: str) -> int:
        return sum(record.generated_by_adapter.get(name, 0) for record in listener.batches)

    until(lambda: (counted(adapter.name), counted("")) == (14, 12))
    assert max(record.adapters for record in listener.batches) == 1
    assert sum(record.prompts_by_adapter.get(adapter.name, 0) for record in listener.batches) == 2


def test_a_lost_page_makes_the_engine_unhealthy_for_ever(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sink = make_engine(kv_cache_bytes=8 << 20, max_model_len=512), TextSink()
    assert engine.problem() == "the engine's threads do not run"
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "release", lambda self, pages: None)
        engine.submit(draw(9), None, GREEDY, sink)
        sink.generation()
    until(lambda: cache_of(engine).sequences == 0)
    assert engine.healthy()
    for _ in range(2):
        with pytest.raises(IntegrityError, match="1 references, but 0 sequences hold it"):
            engine.check_integrity()
        assert "1 references, but 0 sequences hold it" in (engine.problem() or "")
    assert not engine.healthy()


def test_a_check_of_the_pages_does_not_disturb_streams(text_engine: Engine) -> None:
    sinks = [TextSink() for _ in range(4)]
    for i, sink in enumerate(sinks):
        text_engine.submit(draw(60 + i), None, GenerateParams(max_tokens=100, ignore_eos=True), sink)
    while not all(sink.ended.done() for sink in sinks):
        text_engine.check_integrity()
        sleep(PAUSE_S)
    for sink in sinks:
        sink.generation()


class Releases:
    """Tries to release the adapters of streams, from a thread of its own.

    Args:
        streams: the adapter of each stream of `tokens` tokens.
    """

    def __init__(self, engine: Engine, streams: Sequence[tuple[AdapterRef, TextSink]], tokens: int) -> None:
        self.rounds = 0
        self.wrong: list[str] = []
        self._engine, self._streams, self._tokens = engine, streams, tokens
        self._stop = Event()
        self._thread = Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            self.rounds += 1
            references = {each.name: each.references for each in self._engine.report()}
            released = {name: self._engine.release(name) for name in {each.name for each, _ in self._streams}}
            for adapter, sink in self._streams:
                if len(sink.tokens.get(0, ())) >= self._tokens - 1:
                    continue  # its last token may have been on its way to the sink
                if not references.get(adapter.name) or released[adapter.name]:
                    self.wrong.append(f"{adapter.name}: {references}, {released}")

    def __enter__(self) -> "Releases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)


@pytest.mark.parametrize("pages", [8, 40])
def test_an_adapter_is_in_use_at_every_moment_of_its_streams(
    make_engine: MakeEngine, model_dir: Path, adapter_specs: list[AdapterSpec], pages: int
) -> None:
    """With 8 pages, streams are preempted and wait in the queue."""
    engine = make_engine(kv_cache_bytes=pages * page_bytes(model_dir), max_model_len=512, decode_slowdown=1.0)
    engine.start()
    adapters = [ref(spec.path) for spec in adapter_specs[:2]]
    streams = [(adapters[i % 2], TextSink()) for i in range(6)]
    params = GenerateParams(max_tokens=80, temperature=0.0, ignore_eos=True)
    with engine.paused():
        for i, (adapter, sink) in enumerate(streams):
            engine.submit(draw(50 + i), adapter, params, sink)
    with Releases(engine, streams, 80) as releases:
        for _, sink in streams:
            assert len(sink.generation().choices[0].tokens) == 80
    assert releases.rounds > 20
    assert releases.wrong == []
    assert (cache_of(engine).preemptions > 0) == (pages == 8)
    assert [each.references for each in engine.report()] == [0] * len(engine.report())
    assert all(engine.release(adapter.name) for adapter in adapters)
    engine.check_integrity()
