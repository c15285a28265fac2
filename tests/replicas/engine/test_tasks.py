"""Text and embeddings on one engine: slots, pages and rows are held and freed, and a defect of a task fails alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ranklet.replicas.adapters.reference import WEIGHTS_FILE, AdapterRef
from ranklet.replicas.engine.engine import Engine
from ranklet.replicas.engine.params import EmbedParams, GenerateParams
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.tasks import EmbedTask
from ranklet.replicas.errors import InternalError, InvalidRequest, Unavailable
from tests.assets.adapters import AdapterSpec
from tests.assets.broken import sound
from tests.assets.hanging import hanging
from tests.replicas.asking import PATIENCE_S, ask, assert_same, ref, submit, until
from tests.replicas.engine.recording import MakeEngine, RecordingListener
from tests.replicas.streaming import GREEDY, LONG, TextSink, draw


@pytest.fixture
def text_engine(make_engine: MakeEngine) -> Iterator[Engine]:
    engine = make_engine(kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    yield engine
    engine.check_integrity()


def test_pieces_are_the_whole_answer_and_usage_counts_the_prompt_once(text_engine: Engine) -> None:
    prompts, sink = draw(9, 70), TextSink()
    params = GenerateParams(max_tokens=7, temperature=0.0, ignore_eos=True, n=2, logprobs=3)
    text_engine.submit(prompts, None, params, sink)
    generation = sink.generation()
    assert len(generation.choices) == 4
    for i, choice in enumerate(generation.choices):
        assert choice.tokens.tolist() == sink.tokens[i]
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert [len(each.top) for each in choice.logprobs] == [3] * 7
        assert all(each.top[0][0] == token for each, token in zip(choice.logprobs, sink.tokens[i], strict=True))
    assert sink.tokens[0] == sink.tokens[1], "greedy choices are equal"
    assert sink.ended.result(0).prompt_tokens == 79


@pytest.mark.parametrize("length", [200, 500])  # the longer one is computed in pieces
def test_equal_prompts_that_come_at_once_are_computed_once(make_engine: MakeEngine, length: int) -> None:
    engine = make_engine(kv_cache_bytes=16 << 20, max_model_len=600, max_batch_tokens=700, decode_slowdown=1.0)
    engine.start()
    prompts, sinks = draw(length), [TextSink() for _ in range(6)]
    with engine.paused():
        for sink in sinks[:4]:
            engine.submit(prompts, None, GREEDY, sink)
        engine.submit(prompts, None, replace(GREEDY, n=2), sinks[4])
        engine.submit(draw(length + 1), None, GREEDY, sinks[5])
    found = [sink.generation() for sink in sinks]
    assert len({tuple(choice.tokens.tolist()) for each in found[:5] for choice in each.choices}) == 1
    assert sorted(each.cached_tokens for each in found) == [0, 0] + [length // 64 * 64] * 4
    engine.check_integrity()


def test_a_stop_token_ends_a_choice_with_the_token(text_engine: Engine) -> None:
    prompts, sink = draw(20), TextSink()
    text_engine.submit(prompts, None, GREEDY, sink)
    whole = sink.generation().choices[0].tokens.tolist()
    again, stop = TextSink(), whole[5]
    params = GenerateParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    text_engine.submit(prompts, None, params, again)
    (choice,) = again.generation().choices
    assert choice.tokens.tolist() == whole[: whole.index(stop) + 1] == again.tokens[0]
    assert (choice.finish_reason, choice.stop_token) == ("stop", stop)


def test_seeded_draws_do_not_depend_on_other_requests(text_engine: Engine) -> None:
    prompts = draw(30)
    params = GenerateParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    alone, beside = TextSink(), TextSink()
    text_engine.submit(prompts, None, params, alone)
    wanted = alone.generation().choices[0].tokens.tolist()
    with text_engine.paused():
        others = [TextSink() for _ in range(5)]
        for i, each in enumerate(others):
            text_engine.submit(draw(10 + i), None, GenerateParams(max_tokens=9 + i, seed=i), each)
        text_engine.submit(prompts, None, params, beside)
    assert beside.generation().choices[0].tokens.tolist() == wanted
    assert len({tuple(each.generation().choices[0].tokens.tolist()) for each in others}) == 5


def test_embeddings_beside_text_are_those_that_they_are_alone(
    text_engine: Engine, adapter_specs: list[AdapterSpec]
) -> None:
    adapter: AdapterRef = ref(adapter_specs[0].path)
    prompts = draw(30, 6, 300)
    wanted = [ask(text_engine, prompts, each).result for each in (None, adapter)]
    streams = [TextSink() for _ in range(4)]
    for i, sink in enumerate(streams):
        text_engine.submit(draw(40 + i), adapter if i % 2 else None, LONG, sink)
    until(lambda: all(sink.tokens for sink in streams))
    for each, vectors in zip((None, adapter), wanted, strict=True):
        assert_same(ask(text_engine, prompts, each).result, vectors)
    assert not any(sink.ended.done() for sink in streams), "the vectors came while text was generated"
    for sink in streams:
        assert len(sink.generation().choices[0].tokens) == 400


def test_a_stream_keeps_its_slot(make_engine: MakeEngine, adapter_specs: list[AdapterSpec]) -> None:
    """Another adapter waits for the only slot, and gets it after the stream."""
    engine = make_engine(slots=1, kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    ours, theirs = (ref(spec.path) for spec in adapter_specs[:2])
    sink = TextSink()
    engine.submit(draw(20), ours, LONG, sink)
    until(lambda: len(sink.tokens.get(0, ())) > 3)
    other = submit(engine, draw(5), theirs)
    other.result(PATIENCE_S)
    assert len(sink.generation().choices[0].tokens) == 400
    assert [report.references for report in engine.report()] == [0, 0], "no slot stays in use"


def test_a_load_that_hangs_does_not_stop_streams(make_engine: MakeEngine, model_dir: Path, tmp_path: Path) -> None:
    engine = make_engine(kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    slow, sink = ref(sound(model_dir, tmp_path / "slow")), TextSink()
    with hanging(tmp_path / "slow" / WEIGHTS_FILE):
        waiting = submit(engine, draw(5), slow)
        until(lambda: [each.where for each in engine.report()] == ["loading"])
        engine.submit(draw(20), None, LONG, sink)
        assert len(sink.generation().choices[0].tokens) == 400
        assert not waiting.done()
    waiting.result(PATIENCE_S)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_stream_frees_its_slot_and_pages(
    make_engine: MakeEngine, adapter_specs: list[AdapterSpec], after: int
) -> None:
    engine = make_engine(slots=1, kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    ours, theirs = (ref(spec.path) for spec in adapter_specs[:2])
    sink = TextSink()
    ticket = engine.submit(draw(100), ours, LONG, sink)
    until(lambda: len(sink.tokens.get(0, ())) >= after)
    ticket.cancel()
    ask(engine, draw(5), theirs)
    until(lambda: engine.snapshot().waiting_requests == engine.snapshot().running_requests == 0)
    assert not sink.ended.done()
    assert len(sink.tokens.get(0, ())) < 400
    engine.check_integrity()


def test_stopping_refuses_running_streams(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    sink = TextSink()
    engine.submit(draw(20), None, LONG, sink)
    until(lambda: bool(sink.tokens))
    stopping = Thread(target=engine.stop)
    stopping.start()
    with pytest.raises(Unavailable):
        sink.ended.result(PATIENCE_S)
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


def test_only_first_outputs_count_as_waits_in_the_queue(make_engine: MakeEngine) -> None:
    listener, sink = RecordingListener(), TextSink()
    engine = make_engine(listener=listener, kv_cache_bytes=8 << 20, max_model_len=512)
    engine.start()
    engine.submit(draw(9, 40, 2), None, GREEDY, sink)
    sink.generation()
    until(lambda: sum(record.generated for record in listener.batches) == 3 * 12)
    assert sum(record.tokens for record in listener.batches) == 51
    assert sum(len(record.queue_waits_s) for record in listener.batches) == 3


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        (20, GenerateParams(max_tokens=493), "expected at most 492"),
        (20, GenerateParams(max_tokens=0), "at least 1"),
        (20, GenerateParams(logit_bias=((5000, 1.0),)), "5000"),
    ],
)
def test_bad_parameters_are_refused(text_engine: Engine, prompt: int, params: GenerateParams, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        text_engine.submit(draw(prompt), None, params, TextSink())


def test_a_base_that_is_served_for_embeddings_says_so(engine: Engine, model_dir: Path) -> None:
    assert (model_dir / "modules.json").is_file()
    with pytest.raises(InvalidRequest, match="kv_cache_bytes"):
        engine.submit(draw(5), None, GREEDY, TextSink())


class RaisingTask(EmbedTask):
    def accept(self, sequence: Sequence, output: Any) -> tuple[None, bool]:
        raise ValueError("a defect of the task")


class EndlessTask(EmbedTask):
    def accept(self, sequence: Sequence, output: Any) -> tuple[None, bool]:
        return None, False


@pytest.mark.parametrize(("kind", "says"), [(RaisingTask, "a defect of the task"), (EndlessTask, "after the last one")])
def test_a_task_with_a_defect_fails_its_own_request_only(
    engine: Engine, adapter_specs: list[AdapterSpec], kind: type[EmbedTask], says: str
) -> None:
    adapter, sink = ref(adapter_specs[0].path), TextSink()
    with engine.paused():
        task = kind(EmbedParams(), 1, engine.limits, engine.heads.base, normalize=True)
        engine.submit_task(draw(20), adapter, task, sink)
        beside = submit(engine, draw(5), adapter)
    with pytest.raises(InternalError, match=says):
        sink.ended.result(PATIENCE_S)
    assert beside.result(PATIENCE_S).result.shape == (1, 128)
    assert engine.healthy()
